"""Answer metrics as pure functions: same input, same output, nothing is changed, nothing is downloaded.

Every score lies in 0..1 (CIDEr as its authors define it). Each function follows one published scorer to the digit and
says which; where two published scorers disagree there are two functions, never one that picks:

- :func:`vqa_accuracy` is the official VQAv2 / OK-VQA accuracy, :func:`textvqa_accuracy` its M4C variant used for
  TextVQA by MMF, LLaVA and MGM. They differ where all ten people agree ("Yes" against ten times "yes" scores 0 in the
  first and 1 in the second), on commas ("red,white") and on "'s".
- Caption metrics (:func:`bleu4`, :func:`rouge_l`, :func:`cider`) are corpus scores: never average them over shards.
- :func:`circular_accuracy`, :func:`first_pass_accuracy` and :func:`all_rows_accuracy` of one multiple-choice evaluation
  are three numbers, never one column.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

from mgm_exp.evaluate.caption_tokens import caption_tokens
from mgm_exp.evaluate.captions import bleu4, cider, rouge_l
from mgm_exp.evaluate.choices import extract_choice
from mgm_exp.evaluate.circular import CircularRow, all_rows_accuracy, circular_accuracy, first_pass_accuracy
from mgm_exp.evaluate.classification import class_scores, confusion_matrix, macro_f1, mme_yes_no, pope_yes_no
from mgm_exp.evaluate.gqa import gqa, gqa_prediction
from mgm_exp.evaluate.open_answers import open_answer_accuracy

__all__ = [
    "CircularRow",
    "all_rows_accuracy",
    "anls",
    "bleu4",
    "caption_tokens",
    "cider",
    "circular_accuracy",
    "class_scores",
    "confusion_matrix",
    "exact_match",
    "extract_choice",
    "first_pass_accuracy",
    "gqa",
    "gqa_prediction",
    "macro_f1",
    "mme_yes_no",
    "normalize_textvqa",
    "normalize_vqa",
    "open_answer_accuracy",
    "pope_yes_no",
    "rouge_l",
    "textvqa_accuracy",
    "token_f1",
    "vqa_accuracy",
]

# -- VQA accuracy and its TextVQA (M4C) variant --------------------------------------------------------------------

_PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0", **{word: str(value) for value, word in enumerate(_NUMBER_WORDS)}}
# The official table maps a spelling that lacks one apostrophe to the full one; forms it does not list stay as they are.
_CONTRACTIONS_IN_FULL = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    full[:place] + full[place + 1 :]: full
    for full in _CONTRACTIONS_IN_FULL.split()
    for place, character in enumerate(full)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # the official table has this one the wrong way round

_DIGITS_WITH_COMMA = re.compile(r"\d,\d", re.ASCII)
_PERIOD_BEFORE_NO_DIGIT = re.compile(r"\.(?!\d)", re.ASCII)
# The official code passes a flag (32) where re.sub expects the number of replacements.
_MOST_PERIODS = 32


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    result = text
    drop_all = _DIGITS_WITH_COMMA.search(text) is not None
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if drop_all or beside_space else " ")
    return _PERIOD_BEFORE_NO_DIGIT.sub("", result, count=_MOST_PERIODS)


def _plain_words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


@lru_cache(maxsize=1 << 16)
def normalize_vqa(text: str) -> str:
    """The normal form of the official VQA code: punctuation, then number words, articles and contractions."""
    return _plain_words(_without_punctuation(_one_line(text)))


@lru_cache(maxsize=1 << 16)
def normalize_textvqa(text: str) -> str:
    """The normal form of M4C's ``EvalAIAnswerProcessor``: lower case, no commas, "'s" set apart, then as VQA.

    Source: facebookresearch/mmf, ``mmf/utils/m4c_evaluators.py``; MGM's and LLaVA's copies are the same.
    """
    words = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalize_vqa(words)


def _agreement(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the leave-one-out sets of ``min(1, matches / 3)``, in closed form."""
    n = len(answers)
    matches = sum(answer == prediction for answer in answers)
    left_out_match = min(1.0, (matches - 1) / 3) if matches else 0.0
    left_out_other = min(1.0, matches / 3)
    return (matches * left_out_match + (n - matches) * left_out_other) / n


def _references(answers: Sequence[str] | str) -> list[str]:
    """A list of reference answers; one string is one reference, not a list of letters."""
    references = [answers] if isinstance(answers, str) else list(answers)
    if not references:
        raise ValueError("no reference answer was given: a prediction can only be scored against at least one")
    return references


def vqa_accuracy(prediction: str, answers: Sequence[str] | str) -> float:
    """Official VQAv2 / OK-VQA accuracy: with ten answers 0, 1, 2, 3, >= 4 matches give 0, 0.3, 0.6, 0.9, 1.

    Nothing is normalised when all answers are the same string, as in the official code: "yes." against ten times
    "yes" scores 0.

    Args:
        prediction: The model's answer.
        answers: Answers of the people who were asked, usually ten. With n of them the score cannot exceed (n - 1) / 3.

    Raises:
        ValueError: there is no answer.

    Source: Antol et al. 2015; GT-Vision-Lab/VQA, ``vqaEvaluation/vqaEval.py``.
    """
    references = [_one_line(answer) for answer in _references(answers)]
    prediction = _one_line(prediction)
    if len(set(references)) > 1:
        references = [normalize_vqa(answer) for answer in references]
        prediction = normalize_vqa(prediction)
    return _agreement(prediction, references)


def textvqa_accuracy(prediction: str, answers: Sequence[str] | str) -> float:
    """TextVQA accuracy (M4C): prediction and answers are always normalised, then scored as VQA accuracy.

    Args:
        prediction: The model's answer.
        answers: Ten answers in TextVQA. With n of them the score cannot exceed (n - 1) / 3.

    Raises:
        ValueError: there is no answer.

    Source: Singh et al. 2019; ``TextVQAAccuracyEvaluator`` of facebookresearch/mmf.
    """
    references = [normalize_textvqa(answer) for answer in _references(answers)]
    return _agreement(normalize_textvqa(prediction), references)


# -- exact match, token F1, ANLS -----------------------------------------------------------------------------------

_ARTICLE_WORDS = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _squad_normal(text: str) -> str:
    return " ".join(_ARTICLE_WORDS.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def _best(score: Callable[[str, str], float], prediction: str, answers: Sequence[str] | str) -> float:
    return max(score(prediction, answer) for answer in dict.fromkeys(_references(answers)))  # most people agree


def exact_match(prediction: str, answers: Sequence[str] | str) -> float:
    """SQuAD v1.1 exact match: 1 if the normal forms (lower case, no punctuation, no articles) are equal."""
    return _best(lambda given, answer: float(_squad_normal(given) == _squad_normal(answer)), prediction, answers)


def _f1(prediction: str, answer: str) -> float:
    given, wanted = _squad_normal(prediction).split(), _squad_normal(answer).split()
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


def token_f1(prediction: str, answers: Sequence[str] | str) -> float:
    """SQuAD v1.1 F1 of the bags of words, best over the answers; two empty normal forms score 1."""
    return _best(_f1, prediction, answers)


def _edit_distance(left: str, right: str) -> int:
    row = list(range(len(right) + 1))
    for i, from_left in enumerate(left, 1):
        diagonal, row[0] = row[0], i
        for j, from_right in enumerate(right, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (from_left != from_right))
    return row[-1]


def _anls_one(prediction: str, answer: str) -> float:
    given, wanted = prediction.lower().strip(), answer.lower().strip()
    longest = max(len(given), len(wanted))
    if longest and 1 - abs(len(given) - len(wanted)) / longest < 0.5:
        return 0.0  # so many letters are too few that the others cannot make up for it
    similarity = 1.0 if longest == 0 else 1 - _edit_distance(given, wanted) / longest
    return similarity if similarity >= 0.5 else 0.0


def anls(prediction: str, answers: Sequence[str] | str) -> float:
    """Average normalised Levenshtein similarity of one answer: 1 - distance / length, 0 below 0.5, best over answers.

    Two empty texts score 1 (the original divides by zero there).

    Source: Biten et al. 2019; ``STVQAANLSEvaluator`` of facebookresearch/mmf.
    """
    return _best(_anls_one, prediction, answers)
