"""Caption words as the Penn Treebank tokeniser of pycocoevalcap gives them, without Java.

The rules that matter in captions: punctuation apart and then dropped, brackets as words (the published list of dropped
marks has them in capitals, the tokeniser gives small letters), contractions in two ("don't" -> "do n't"), marks inside
numbers and times kept ("12:30", "1,000"), hyphened words and common abbreviations kept. Rarer rules of the Java
tokeniser (addresses, fractions, emoticons, sentence ends after abbreviations) are not reproduced.
"""

from __future__ import annotations

import re

_ABBREVIATIONS = "mr mrs ms dr st vs etc sgt jr sr ave blvd inc co corp ltd prof gen capt lt gov sen rep mt"
_TOKEN = re.compile(
    r"<[a-z]+>"
    rf"|(?i:\b(?:{'|'.join(_ABBREVIATIONS.split())})\.)|(?i:\bno\.(?=\s*\d))"
    r"|(?:[A-Za-z]\.){2,}|\b[A-Z]\."
    r"|(?i:'n'(?=\w))"
    r"|(?i:o'clock|ma'am)\b"
    r"|(?i:gon|wan|got)(?=(?i:na|ta)\b)|(?i:gim|lem)(?=(?i:me)\b)|(?i:can)(?=(?i:not)\b)"
    r"|\w+?(?=(?i:n't)\b)|(?i:n't)\b"
    r"|(?i:'(?:s|m|d|re|ve|ll))\b"
    r"|'\d0s\b|(?<!\S)[-+]\d+(?:[.,:/]\d+)*"
    r"|\d+(?:[.,:/]\d+)+(?![\w])"
    r"|[A-Z]+&[A-Z]+|@\w+"
    r"|\w+(?:(?:[-/]|\.(?=[A-Za-z]))\w+)*"
    r"|[!?]+|\.{2,}|-+|[^\w\s]"
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_DROPPED = frozenset("' ` . ? ! , : - -- ... ; \" “ ” ‘ — –".split())
_QUOTES = str.maketrans("’‘", "''")


def caption_tokens(text: str) -> str:
    """The words of a caption, lower case, one blank between them, without punctuation.

    Source: Stanford PTBTokenizer 3.4.1 with ``-preserveLines -lowerCase``, and pycocoevalcap's list of dropped marks.
    """
    words = (_BRACKETS.get(word, word).lower() for word in _TOKEN.findall(text.translate(_QUOTES)))
    return " ".join(word for word in words if word not in _DROPPED and not set(word) <= {"-"})
