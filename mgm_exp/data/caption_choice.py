"""Which captions are wanted of a row, and what becomes of the row once they are there.

    choice = CaptionChoice(policy="keep_if_better", margin=0.02)
    outcome = choice.outcome(row, said)       # the lines that are written, and the fate of each

Whatever is drawn here depends on the row's id and the seed alone: not on the order of rows, batches or processes.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Any

from mgm_exp.config import CaptionerConfig
from mgm_exp.data.formats import DJ_END, DJ_IMAGE, Row
from mgm_exp.data.records import IMAGE_TOKEN, BadRow

STEP = "recaption"
LEFT_BY_MIX, NOT_BETTER = "left by mix", "not better"
_MARKERS = (IMAGE_TOKEN, DJ_IMAGE, DJ_END)

Line = dict[str, Any]


@dataclass(frozen=True)
class Said:
    """What was found out about a row's image: captions, answers and scores, or why there are none.

    Args:
        id: The row's id.
        captions: What the captioner wrote, greedy first; empty where none was wanted.
        answers: One for each question.
        raw_score: Of the caption that the row brought; None: not scored, or there was none.
        scores: Of each new caption; empty: not scored.
        kind, detail: The fault of an image that cannot be opened.
    """

    id: str
    captions: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    raw_score: float | None = None
    scores: tuple[float | None, ...] = ()
    kind: str | None = None
    detail: str = ""

    def to_json(self) -> Line:
        """Plain values; what is empty is left out."""
        values: Line = dict(vars(self))
        return {key: value for key, value in values.items() if key == "id" or value not in (None, (), "")}

    @classmethod
    def from_json(cls, values: Line) -> Said:
        """The inverse of :meth:`to_json`. Raises KeyError, TypeError or ValueError for anything else."""
        fields: Line = dict(values)
        fields.update((key, tuple(values[key])) for key in ("captions", "answers", "scores") if key in values)
        if not all(isinstance(text, str) for key in ("captions", "answers") for text in fields.get(key, ())):
            raise TypeError("captions and answers are texts")
        return cls(**fields)


@dataclass
class Outcome:
    """What is written about one row.

    Args:
        count: What the row counts as: recaptioned, kept_raw, unchanged or rejected.
        why: Why a row keeps its own caption: left by mix, not better, or the fault of what the captioner wrote.
        lines: Rows of ``captions.jsonl``: the row itself, then those that were made out of it.
        bad: The row's line in ``rejected.jsonl``.
        fates: One for the row and one for each row that was added.
        not_added: Captions and answers that became no row.
    """

    count: str
    lines: list[Line] = field(default_factory=list)
    bad: Line | None = None
    fates: list[Line] = field(default_factory=list)
    not_added: int = 0
    why: str = ""


@dataclass(frozen=True)
class CaptionChoice:
    """The policy of recaptioning.

    Args:
        policy: ``replace``: the new caption, always; ``keep_if_better``: where its score is more than ``margin``
            above the raw one's; ``mix``: for a share of the rows.
        mix_share: That share, 0..1.
        margin: In units of the score.
        captions_per_image: The first is greedy; the others are sampled and become rows ``<id>#c2``, ...
        questions: Each is put to the captioner for every image; the answers become rows ``<id>#q1``, ...
        seed: Of whatever is drawn.
    """

    policy: str = "replace"
    mix_share: float = 0.5
    margin: float = 0.0
    captions_per_image: int = 1
    questions: tuple[str, ...] = ()
    seed: int = 0

    @classmethod
    def of_section(cls, section: CaptionerConfig) -> CaptionChoice:
        """The choice that ``data.captioner`` describes."""
        return cls(
            section.policy.value,
            section.mix_share,
            section.scorer.margin,
            section.captions_per_image,
            tuple(section.questions),
            section.seed,
        )

    @property
    def is_scored(self) -> bool:
        """Whether captions are judged by an image-text score."""
        return self.policy == "keep_if_better"

    def wants_captions(self, row_id: str) -> bool:
        """Whether new captions are written for a row that can have one."""
        return self.policy != "mix" or self._draw("mix", row_id) / 2**64 < self.mix_share

    def wants_anything(self, row_id: str) -> bool:
        """Whether the captioner looks at the row's image at all."""
        return bool(self.questions) or self.wants_captions(row_id)

    def seed_of(self, row_id: str, number: int) -> int:
        """The seed of the row's caption ``number`` (from 2), 0..2**63 - 1."""
        return self._draw("caption", row_id, str(number)) >> 1

    def _draw(self, *what: str) -> int:
        """64 evenly distributed bits."""
        digest = hashlib.sha256("\0".join([str(self.seed), *what]).encode()).digest()
        return int.from_bytes(digest[:8], "big")

    def outcome(self, row: Row | BadRow, said: Said | None) -> Outcome:
        """What becomes of a row.

        Args:
            row: As it was read.
            said: What was found out about its image; None where nothing was wanted.
        """
        if isinstance(row, BadRow):
            return _rejected(row)
        if said is None:
            is_pair = can_be_recaptioned(row)
            if is_pair:
                return _kept(row, LEFT_BY_MIX)
            return Outcome("unchanged", [as_it_was(row)], fates=[_fate(row.id, "kept", why="no image with one answer")])
        if said.kind is not None:
            return _rejected(row.bad(said.kind, said.detail))
        outcome = self._first(row, said)
        if outcome.bad is None:
            self._add_captions(outcome, row, said)
            self._add_answers(outcome, row, said)
        return outcome

    def _first(self, row: Row, said: Said) -> Outcome:
        """The row itself, with the new caption or with its own."""
        if not said.captions:
            return _kept(row, LEFT_BY_MIX)
        caption = one_line(said.captions[0])
        fault = fault_of(caption)
        if fault is not None and self.policy == "replace":
            return _rejected(row.bad(*fault))
        scores = _scores(said, 0)
        if fault is not None:
            return _kept(row, fault[0], **scores)
        if not self._is_better(said, 0):
            return _kept(row, NOT_BETTER, caption=caption, **scores)
        return Outcome("recaptioned", [with_caption(row, caption)], fates=[_fate(row.id, "changed", **scores)])

    def _add_captions(self, outcome: Outcome, row: Row, said: Said) -> None:
        """Rows of the sampled captions that say something else than those before them."""
        written = {one_line(said.captions[0])} if outcome.count == "recaptioned" else {one_line(caption_of(row))}
        for place, text in enumerate(said.captions[1:], start=1):
            caption = one_line(text)
            if fault_of(caption) is not None or caption in written or not self._is_better(said, place):
                outcome.not_added += 1
                continue
            written.add(caption)
            made = f"{row.id}#c{place + 1}"
            outcome.lines.append({**with_caption(row, caption), "id": made})
            outcome.fates.append(_fate(made, "added", of=row.id, **_scores(said, place)))

    def _add_answers(self, outcome: Outcome, row: Row, said: Said) -> None:
        for number, (question, text) in enumerate(zip(self.questions, said.answers, strict=True), start=1):
            answer = one_line(text)
            if fault_of(answer) is not None:
                outcome.not_added += 1
                continue
            turns = [
                {"from": "human", "value": f"{IMAGE_TOKEN}\n{question}"},
                {"from": "gpt", "value": answer},
            ]
            made = f"{row.id}#q{number}"
            outcome.lines.append({"id": made, "image": row.image, "conversations": turns})
            outcome.fates.append(_fate(made, "added", of=row.id))

    def _is_better(self, said: Said, place: int) -> bool:
        if not self.is_scored or said.raw_score is None:  # a row without a caption takes any
            return True
        score = said.scores[place]
        return score is not None and round(score - said.raw_score, 6) > self.margin


def is_answer_row(row_id: str) -> bool:
    """Whether a row was made out of a captioner's answer to a question."""
    return re.search(r"#q\d+$", row_id) is not None


def can_be_recaptioned(row: Row) -> bool:
    """Whether a row is an image with one answer."""
    if row.image is None:
        return False
    turns = row.conversations
    return turns is None or [turn.speaker for turn in turns] == ["human", "gpt"]


def caption_of(row: Row) -> str:
    """The caption, or the one answer, of a row that can be recaptioned."""
    return (row.caption or "") if row.conversations is None else row.conversations[1].text


def one_line(text: str) -> str:
    """A text with its white space made single blanks."""
    return " ".join(text.split())


def fault_of(caption: str) -> tuple[str, str] | None:
    """Why what a captioner wrote is no caption: (kind, detail); None: it is one."""
    if not caption:
        return "empty_caption", "the captioner wrote nothing"
    if any(token in caption for token in _MARKERS):
        return "image_token_in_answer", f"the captioner wrote {caption!r:.80}"
    return None


def as_it_was(row: Row) -> Line:
    """A row as it was read, in the form that it came in, with the keys that are not ours."""
    values: Line = {"id": row.id}
    if row.conversations is None:
        images = [] if row.image is None else [row.image]
        values |= {"text": f"{DJ_IMAGE if images else ''}\n{row.caption} {DJ_END}", "images": images}
    else:
        turns = [{"from": turn.speaker, "value": turn.text} for turn in row.conversations]
        values |= ({} if row.image is None else {"image": row.image}) | {"conversations": turns}
    return values | ({} if row.raw_caption is None else {"raw_caption": row.raw_caption}) | dict(row.extra)


def with_caption(row: Row, caption: str) -> Line:
    """The row with another answer, in the form that it came in."""
    values: Line = {"id": row.id}
    if row.conversations is None:
        values |= {"text": f"{DJ_IMAGE}\n{caption} {DJ_END}", "images": [row.image]}
    else:
        turns = [
            {"from": "human", "value": row.conversations[0].text},
            {"from": "gpt", "value": caption},
        ]
        values |= {"image": row.image, "conversations": turns}
    # A caption that replaces a replaced one keeps the first.
    return {
        **values,
        "raw_caption": caption_of(row) if row.raw_caption is None else row.raw_caption,
        **row.extra,
    }


def _scores(said: Said, place: int) -> Line:
    return {"score_raw": said.raw_score, "score_new": said.scores[place]} if said.scores else {}


def _fate(row_id: str | None, fate: str, **detail: Any) -> Line:
    return {"id": row_id, "fate": fate, "step": STEP, "detail": detail}


def _kept(row: Row, why: str, **detail: Any) -> Outcome:
    """A row that could have had a new caption."""
    return Outcome("kept_raw", [as_it_was(row)], fates=[_fate(row.id, "kept", why=why, **detail)], why=why)


def _rejected(bad: BadRow) -> Outcome:
    fate = _fate(bad.id, "dropped", kind=bad.kind, detail=bad.detail, line=bad.line)
    return Outcome("rejected", bad=bad.to_json(), fates=[fate])
