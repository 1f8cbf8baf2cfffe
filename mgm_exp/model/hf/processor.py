"""Conversations and images as the inputs of a model of transformers, with labels on the answers alone.

    processor = open_processor(folder, max_length=2048)
    example = processor.inputs(record.turns(), image)      # input_ids, labels, pixel_values, ...
    batch = processor.collate([example, ...])

Whatever keys a processor makes are kept: those as long as ``input_ids`` belong to tokens, the others to images.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mgm_exp.errors import BoundaryNotFound, ImageTruncated, ModelError, UnusableRow
from mgm_exp.model.configuration import IGNORE_INDEX
from mgm_exp.model.hf.dialect import ChatTemplate, Dialect, PrefixSuffix, Turns, Written

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_COUNT = "image_count"
_IMAGE_TOKENS = ("image_token", "boi_token", "start_image_token", "fake_image_token")
_PROBE = [
    {"from": "human", "value": "<image>\nWhat is it?"},
    {"from": "gpt", "value": "A sign."},
    {"from": "human", "value": "Which colour?"},
    {"from": "gpt", "value": "Red, I think."},
]


class HfProcessor:
    """See the module.

    Args:
        processor: Of transformers.
        stop_token_ids: Tokens that end an answer.
        pad_token_id: Fills up rows; it is masked.
        model_max_length: Tokens of a sequence, image tokens included; longer ones are cut, never inside an image.

    Raises:
        ModelError: answers cannot be told from questions in what the processor writes, or images not from text.
    """

    def __init__(
        self, processor: Any, stop_token_ids: Sequence[int], pad_token_id: int, model_max_length: int | None
    ) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.model_max_length = model_max_length or 2**31
        self.pad_token_id, self.stop_token_ids = pad_token_id, list(stop_token_ids)
        self.dialect = self._dialect()
        self._expansions: dict[tuple[int, int], int] = {}
        self._probe()

    # -- training ------------------------------------------------------------------------------------------------

    def inputs(self, turns: Turns, image: Image | None) -> dict[str, Tensor]:
        """One example: the processor's tensors and ``labels`` (T,), cut to ``model_max_length``.

        Raises:
            UnusableRow: see :meth:`measure`.
        """
        written = self.dialect.conversation(turns, image is not None)
        made = self._processed(written, image)
        ids = made["input_ids"][0].tolist()
        before, after = _aligned(written, ids)
        labels = torch.full((len(ids),), IGNORE_INDEX)
        for place, learnt in enumerate(written.learnt):
            if learnt:
                there = place if place < before else place + len(ids) - len(written.ids)
                labels[there] = ids[there]
        if image is not None and len(ids) - after > self.model_max_length:
            raise self._image_does_not_fit(len(ids) - after)
        example = {key: self._cut(value, len(ids)) for key, value in made.items()}
        example["labels"] = labels[: self.model_max_length]
        return example

    def measure(self, turns: Turns, size: tuple[int, int] | None) -> tuple[int, int, bool]:
        """Without an image at hand: tokens in all, tokens that are learnt within ``model_max_length``, and whether any
        token is an answer's.

        Args:
            size: Width and height of the image; None: there is none.

        Raises:
            UnusableRow: the model takes no such row, its boundaries cannot be found, or its image does not fit.
        """
        written = self.dialect.conversation(turns, size is not None)
        extra = 0
        place = -1
        if size is not None:
            extra = self._expansion(size)
            place = self._place(written)
            if place + 1 + extra > self.model_max_length:
                raise self._image_does_not_fit(place + 1 + extra)
        limit = self.model_max_length
        supervised = 0
        for number, learnt in enumerate(written.learnt):
            there = number + (extra if number > place else 0)
            supervised += learnt and 0 < there < limit
        return len(written.ids) + extra, supervised, any(written.learnt)

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Puts examples of :meth:`inputs` together, padded on the right; ``ids`` and ``image_count`` beside them."""
        batch = self._batch(examples, is_left=False)
        batch["ids"] = [str(example["id"]) for example in examples]
        batch[IMAGE_COUNT] = sum(
            any(key not in _token_keys(example) for key in _tensors(example)) for example in examples
        )
        return batch

    # -- asking --------------------------------------------------------------------------------------------------

    def prompt_length(self, question: str) -> int:
        """Tokens of a question about an image, the image counted once."""
        return len(self.dialect.prompt(question, True).ids)

    def prompts(self, questions: Sequence[str], images: Sequence[Image]) -> dict[str, Tensor]:
        """Questions that are answered together, padded on the left."""
        made = [
            {key: self._rows(value) for key, value in self._processed(self.dialect.prompt(q, True), image).items()}
            for q, image in zip(questions, images, strict=True)
        ]
        return self._batch(made, is_left=True)

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """The text of an answer, without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    # -- how a processor is understood ---------------------------------------------------------------------------

    def _dialect(self) -> Dialect:
        stops = [str(self.tokenizer.convert_ids_to_tokens(token)) for token in self.stop_token_ids]
        if not stops:
            raise ModelError(
                "Neither generation_config.json nor the tokenizer of the model names a token that ends text."
            )
        if getattr(self.processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None):
            if not self.tokenizer.is_fast:
                raise ModelError(
                    "The model's tokenizer cannot say where tokens stand in a text (it is no fast tokenizer).",
                    advice="Save it as tokenizer.json.",
                )
            return ChatTemplate(self.processor, stops)
        if "suffix" in inspect.signature(type(self.processor).__call__).parameters:
            return PrefixSuffix(self.processor, stops)
        raise ModelError(
            f"{type(self.processor).__name__} of the model has no chat template and takes no suffix, so conversations "
            "cannot be written for it.",
            advice="Put a chat_template.jinja into the model's folder.",
        )

    def _probe(self) -> None:
        """A conversation of two turns (or one), with and without its image: what cannot be told is told here."""
        from PIL import Image

        turns = _PROBE if isinstance(self.dialect, ChatTemplate) else _PROBE[:2]
        blank = Image.new("RGB", (64, 48))
        limit, self.model_max_length = self.model_max_length, 2**31
        try:
            length, supervised, _ = self.measure(turns, blank.size)
            example = self.inputs(turns, blank)
            asked = self._processed(self.dialect.prompt(turns[0]["value"], True), blank)["input_ids"][0]
        except UnusableRow as error:
            raise ModelError(
                f"The model's conversations cannot be learnt from: {error.message}.",
                advice="Its chat template must write a conversation's beginning in the same way however it goes on.",
            ) from error
        finally:
            self.model_max_length = limit
        ids, labels = example["input_ids"], example["labels"]
        first = int((labels != IGNORE_INDEX).nonzero()[0])
        if length != len(ids) or supervised != int((labels[1:] != IGNORE_INDEX).sum()):
            raise ModelError(f"The model's processor makes {len(ids)} tokens of a row that was counted as {length}.")
        if asked.tolist() != ids[:first].tolist():
            raise ModelError(
                "The model's processor writes a question in another way where an answer follows, so what is trained "
                "would not be what is asked."
            )

    def _place(self, written: Written) -> int:
        """Where the placeholder of the image stands; -1: in front of everything (prefix and suffix)."""
        if isinstance(self.dialect, PrefixSuffix):
            return -1
        for name in _IMAGE_TOKENS:
            token = getattr(self.processor, name, None) or getattr(self.tokenizer, name, None)
            found = self.tokenizer.convert_tokens_to_ids(str(token)) if token is not None else None
            if found is not None and written.ids.count(found) == 1:
                return written.ids.index(found)
        raise BoundaryNotFound("where the image stands in the model's chat template cannot be told")

    def _expansion(self, size: tuple[int, int]) -> int:
        """Tokens that an image of this size adds to those of the text."""
        if size not in self._expansions:
            from PIL import Image

            written = self.dialect.prompt("What is it?", True)
            made = self._processed(written, Image.new("RGB", size))["input_ids"]
            self._expansions[size] = made.shape[1] - len(written.ids)
        return self._expansions[size]

    def _processed(self, written: Written, image: Image | None) -> dict[str, Tensor]:
        words: dict[str, Any] = {**self.dialect.keywords(written.text), "return_tensors": "pt"}
        if written.suffix is not None:
            words["suffix"] = [written.suffix]
        try:
            made = self.processor(text=[written.text], images=None if image is None else [image], **words)
        except ValueError as error:  # an image that is too long and narrow for Qwen's, ...
            raise UnusableRow(f"the model's processor refuses the row: {error}") from error
        return {key: value for key, value in made.items() if key != "labels"}

    def _rows(self, value: Any) -> Tensor:
        if not isinstance(value, Tensor) or not value.dim():
            raise ModelError(
                f"{type(self.processor).__name__} makes a {type(value).__name__}, which cannot be batched."
            )
        return value

    def _cut(self, value: Any, length: int) -> Tensor:
        """A tensor of tokens (1, T) as (T,), cut; one of images as it is."""
        value = self._rows(value)
        return value[0, : self.model_max_length] if tuple(value.shape) == (1, length) else value

    def _image_does_not_fit(self, needed: int) -> ImageTruncated:
        return ImageTruncated(f"the image ends at token {needed}; max_length is {self.model_max_length}")

    def _batch(self, examples: Sequence[Mapping[str, Any]], *, is_left: bool) -> dict[str, Any]:
        rows = [_flat(example) for example in examples]
        tokens = _token_keys(rows[0])
        longest = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": self.pad_token_id, "labels": IGNORE_INDEX}
        batch: dict[str, Any] = {}
        for key in sorted({key for row in rows for key in row}):
            there = [row[key] for row in rows if key in row]
            if key in tokens:
                batch[key] = torch.full((len(rows), longest), fill.get(key, 0), dtype=there[0].dtype)
                for line, row in zip(batch[key], rows, strict=True):
                    if key in row:
                        line[longest - len(row[key]) if is_left else 0 :][: len(row[key])] = row[key]
            else:
                batch[key] = _stacked(there)
        return batch


def _aligned(written: Written, ids: Sequence[int]) -> tuple[int, int]:
    """How many tokens are the same from the front and from the back once the image has its own.

    Raises:
        BoundaryNotFound: a token of an answer is not among them.
    """
    n, m = len(written.ids), len(ids)
    before = next((i for i in range(min(n, m)) if written.ids[i] != ids[i]), min(n, m))
    after = next((i for i in range(min(n - before, m - before)) if written.ids[n - 1 - i] != ids[m - 1 - i]), None)
    after = min(n - before, m - before) if after is None else after
    if any(written.learnt[before : n - after]):
        raise BoundaryNotFound("the processor writes an answer in other tokens once the image has its own")
    return before, after


def _tensors(example: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in example.items() if isinstance(value, Tensor)}


def _flat(example: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of tokens as (T,), also where they came as (1, T)."""
    tokens = _token_keys(example)
    return {k: v[0] if k in tokens and v.dim() == 2 else v for k, v in _tensors(example).items()}


def _token_keys(example: Mapping[str, Any]) -> set[str]:
    """Keys whose tensors have an entry for each token."""
    shape = example["input_ids"].shape
    return {key for key, value in _tensors(example).items() if value.shape == shape}


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """Images one behind the other; where they differ in later dimensions, filled up with zeros (as processors do)."""
    shapes = {tuple(value.shape[1:]) for value in values}
    if len(shapes) > 1:
        most = [max(sides) for sides in zip(*shapes, strict=True)]
        padded = []
        for value in values:
            whole = value.new_zeros(value.shape[0], *most)
            whole[tuple(slice(0, side) for side in value.shape)] = value
            padded.append(whole)
        values = padded
    return torch.cat(list(values))
