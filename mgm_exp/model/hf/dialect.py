"""How a model writes a conversation: by its chat template, or as prefix and suffix (PaliGemma).

Which tokens are learnt is derived from the text alone and never guessed: an answer begins where the prompt of its
question ends, as it is rendered for generation, and ends with the first token that stops a generation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mgm_exp.errors import BoundaryNotFound, ModelError, SpecialTokenInText, UnusableRow
from mgm_exp.model.configuration import IMAGE_TOKEN

Turns = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Written:
    """A conversation as text and tokens, its image still one placeholder (or none yet, in front of everything).

    Args:
        text: What the processor is given.
        ids: Its tokens.
        learnt: For each token, whether it belongs to an answer.
        suffix: The answer, where the processor takes it apart from the text.
    """

    text: str
    ids: list[int]
    learnt: list[bool]
    suffix: str | None = None


class Dialect(ABC):
    """Writes conversations for one processor.

    Args:
        processor: Of transformers.
        stops: Texts of the tokens that end an answer.
    """

    def __init__(self, processor: Any, stops: Sequence[str]) -> None:
        self.processor, self.tokenizer, self.stops = processor, processor.tokenizer, tuple(stops)
        special = {*self.tokenizer.all_special_tokens, *self.stops}
        special |= {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        self.special = sorted(token for token in special if token)

    @abstractmethod
    def conversation(self, turns: Turns, has_image: bool) -> Written:
        """A conversation with its answers.

        Raises:
            UnusableRow: the model takes no such row, or its boundaries cannot be found.
        """

    @abstractmethod
    def prompt(self, question: str, has_image: bool) -> Written:
        """A question, ready to be answered."""

    def keywords(self, text: str) -> dict[str, Any]:
        """How the processor tokenises a text: as `apply_chat_template` of transformers has it."""
        bos = self.tokenizer.bos_token
        return {"add_special_tokens": not (bos and text.startswith(bos))}

    def refuse_special(self, text: str) -> None:
        """
        Raises:
            SpecialTokenInText: it holds one.
        """
        found = next((token for token in self.special if token in text), None)
        if found is not None:
            raise SpecialTokenInText(f"a turn holds {found!r}, a special token of the model's tokenizer")


class ChatTemplate(Dialect):
    """Conversations by the processor's chat template.

    A template that ends no answer (that of LLaVA-1.5 writes a blank) would teach the model never to stop: the
    tokenizer's end token then takes the place of the blanks, as in the original training of such models.
    """

    def conversation(self, turns: Turns, has_image: bool) -> Written:
        messages = [self._message(turn) for turn in turns]
        roles = [message["role"] for message in messages]
        if any(roles[i] == roles[i + 1] for i in range(len(roles) - 1)):
            raise UnusableRow("two turns in a row are from the same side")
        whole = self._render(messages)
        pieces: list[str] = []
        spans: list[tuple[int, int]] = []
        done = length = 0
        for place, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start, end = self._span(messages, place, whole)
            before, learnt, rest = whole[done:start], *self._ended(whole[start:end], message["content"][0]["text"])
            spans.append((length + len(before), length + len(before) + len(learnt)))
            pieces += [before, learnt, rest]
            length += len(before) + len(learnt) + len(rest)
            done = end
        text = "".join([*pieces, whole[done:]])
        return self._tokens(text, spans)

    def prompt(self, question: str, has_image: bool) -> Written:
        content: list[dict[str, str]] = [{"type": "image"}] if has_image else []
        content.append({"type": "text", "text": question.replace(IMAGE_TOKEN, "").strip()})
        return self._tokens(self._render([{"role": "user", "content": content}], asks=True), [])

    def _message(self, turn: Mapping[str, str]) -> dict[str, Any]:
        text = turn["value"]
        is_answer = turn["from"] == "gpt"
        has_image = not is_answer and IMAGE_TOKEN in text
        if has_image:
            text = text.replace(IMAGE_TOKEN, "")
        self.refuse_special(text)
        content: list[dict[str, str]] = [{"type": "image"}] if has_image else []
        content.append({"type": "text", "text": text.strip()})
        return {"role": "assistant" if is_answer else "user", "content": content}

    def _render(self, messages: list[dict[str, Any]], *, asks: bool = False) -> str:
        import jinja2

        try:
            return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise BoundaryNotFound(f"the model's chat template refuses the conversation: {error}") from error

    def _span(self, messages: list[dict[str, Any]], place: int, whole: str) -> tuple[int, int]:
        """Where an answer stands in the whole text, what ends its turn included."""
        prompt = self._render(messages[:place], asks=True)
        upto = self._render(messages[: place + 1])
        if not (upto.startswith(prompt) and whole.startswith(upto)):
            raise BoundaryNotFound(
                f"turn {place}: the model's chat template writes the beginning of a conversation in another way once "
                "it goes on, so where the answer begins cannot be told"
            )
        return len(prompt), len(upto)

    def _ended(self, span: str, answer: str) -> tuple[str, str]:
        """What is learnt of an answer's span (with the token that stops a generation), and what follows it."""
        found = span.find(answer)
        if found < 0:
            raise BoundaryNotFound(f"the model's chat template changes the text of an answer ({answer[:40]!r})")
        after = found + len(answer)
        ends = [(span.find(stop, after), stop) for stop in self.stops]
        place, stop = min(((place, stop) for place, stop in ends if place >= 0), default=(-1, ""))
        if place >= 0:
            return span[: place + len(stop)], span[place + len(stop) :]
        if span[after:].strip():
            raise BoundaryNotFound(f"the model's chat template ends an answer with {span[after:]!r}, no end token")
        return span[:after] + self._end(), ""

    def _end(self) -> str:
        end = self.tokenizer.eos_token
        if end is None:
            raise ModelError("The model's tokenizer names no eos_token, so an answer has no end.")
        return str(end)

    def _tokens(self, text: str, spans: Sequence[tuple[int, int]]) -> Written:
        encoded = self.tokenizer(text, return_offsets_mapping=True, **self.keywords(text))
        learnt = []
        for start, end in encoded["offset_mapping"]:
            inside = any(first <= start and end <= last for first, last in spans) and end > start
            if not inside and any(start < last and end > first for first, last in spans):
                raise BoundaryNotFound(f"one token reaches over the beginning or end of an answer: {text[start:end]!r}")
            learnt.append(inside)
        return Written(text, list(encoded["input_ids"]), learnt)


class PrefixSuffix(Dialect):
    """One question as prefix, one answer as suffix, by a processor that takes ``suffix`` (Beyer et al., PaliGemma)."""

    def conversation(self, turns: Turns, has_image: bool) -> Written:
        if len(turns) != 2:
            raise UnusableRow(f"{len(turns)} turns; the model has no chat template and takes one question, one answer")
        question, answer = turns[0]["value"], turns[1]["value"].strip()
        self.refuse_special(answer)
        asked = self.prompt(question, has_image)
        ids = self.tokenizer(answer + str(self.tokenizer.eos_token), add_special_tokens=False)["input_ids"]
        return Written(asked.text, asked.ids + ids, [False] * len(asked.ids) + [True] * len(ids), answer)

    def prompt(self, question: str, has_image: bool) -> Written:
        if not has_image:
            raise UnusableRow("the row has no image, and the model takes none without")
        text = question.replace(IMAGE_TOKEN, "").strip()
        self.refuse_special(text)
        ids = self.tokenizer(f"{self.tokenizer.bos_token}{text}\n", add_special_tokens=False)["input_ids"]
        return Written(f"{self.processor.image_token}{text}", list(ids), [False] * len(ids))

    def keywords(self, text: str) -> dict[str, Any]:
        return {}
