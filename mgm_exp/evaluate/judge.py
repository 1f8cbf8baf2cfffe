"""A language model behind an OpenAI-compatible address that reads the option out of an answer the rules cannot read.

What it says is read by the same rules; where it names no option, none is taken: nothing is ever guessed.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO, Any

from mgm_exp.errors import UserError
from mgm_exp.evaluate.choices import extract_choice
from mgm_exp.store import parse_record

KEY = "MGM_EXP_JUDGE_KEY"
"""Environment variable with the server's key; not needed for a server without one."""
_LONGEST_ANSWER = 4000
_LONGEST_REPLY = 1 << 20
_ATTEMPTS = 4
_AGAIN = {408, 409, 429, 500, 502, 503, 504}
_PROMPT = (
    "Someone was asked a multiple-choice question and answered in their own words. Which option does the answer mean? "
    "Reply with the letter of that option alone, or with Z if the answer means none of them or more than one.\n\n"
    "Question: {question}\nOptions:\n{options}\nAnswer: {answer}\n\nLetter:"
)


class JudgeFailed(UserError):
    """The judge's server cannot be asked. Answers given so far are kept; the same command continues."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to the address that was given, and to no other."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Message, newurl: str
    ) -> None:
        return None


@dataclass(frozen=True)
class Judge:
    """See the module.

    Args:
        url: Address that ``/chat/completions`` is put behind.
        model: Name of the model there.
        timeout_s: Seconds to wait for one reply.
    """

    url: str
    model: str
    timeout_s: float = 60.0

    def choice(self, question: str, options: Mapping[str, str], answer: str) -> str | None:
        """The letter that an answer means, or None.

        Raises:
            JudgeFailed: the server refuses, or does not answer after several attempts.
        """
        reply = self._ask(prompt_of(question, options, answer))
        letter = extract_choice(reply, {letter: letter for letter in options})
        return letter if letter in options else None

    def _ask(self, prompt: str) -> str:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "max_tokens": 16,
        }
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {os.environ[KEY]}"
        request = urllib.request.Request(  # the schema allows https, and http to this machine only
            f"{self.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
        )
        opener = urllib.request.build_opener(_NoRedirect)
        why = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(2.0 ** (attempt - 1))
            try:
                with opener.open(request, timeout=self.timeout_s) as response:
                    return _text_of(response.read(_LONGEST_REPLY))
            except urllib.error.HTTPError as error:
                why = f"HTTP {error.code}"
                error.close()
                if error.code not in _AGAIN:
                    break
            except (OSError, ValueError) as error:
                why = f"{type(error).__name__}: {error}"
        raise JudgeFailed(
            f"The judge eval.judge.model={self.model} at {self.url} did not answer: {why}.",
            advice=f"Check address, model and the key in {KEY}; the same command continues. Without eval.judge.url "
            "unreadable answers count as wrong.",
        )


def prompt_of(question: str, options: Mapping[str, str], answer: str) -> str:
    """What the judge is asked."""
    listed = "\n".join(f"{letter}. {text}" for letter, text in options.items())
    return _PROMPT.format(question=question, options=listed, answer=answer[:_LONGEST_ANSWER])


def _text_of(raw: bytes) -> str:
    try:
        return str(parse_record(raw)["choices"][0]["message"]["content"] or "")
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"no chat completion ({type(error).__name__}: {error})") from error


class Verdicts:
    """A judge whose replies are kept in a file: an interrupted evaluation does not pay for them again.

    Args:
        judge: Who is asked.
        path: JSON lines of ``{"asked": hash, "choice": letter or null}``.
    """

    def __init__(self, judge: Judge, path: Path) -> None:
        self.judge, self.path = judge, Path(path)
        self._known: dict[str, str | None] = {}
        if self.path.is_file():
            for line in self.path.read_bytes().split(b"\n")[:-1]:
                found: Any = json.loads(line)
                self._known[found["asked"]] = found["choice"]

    def choice(self, question: str, options: Mapping[str, str], answer: str) -> str | None:
        """As :meth:`Judge.choice`."""
        text = "\0".join((self.judge.url, self.judge.model, prompt_of(question, options, answer)))
        asked = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        if asked not in self._known:
            self._known[asked] = self.judge.choice(question, options, answer)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"asked": asked, "choice": self._known[asked]}) + "\n")
        return self._known[asked]
