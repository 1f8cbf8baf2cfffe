"""What a model's answers are worth when images are worse, words are other ones, or the answer is a rare one."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mgm_exp.config import RobustnessConfig
from mgm_exp.errors import DataError
from mgm_exp.evaluate.benchmarks.base import Benchmark, mean, refuse
from mgm_exp.evaluate.corruptions import Corruption
from mgm_exp.evaluate.metrics import normalize_textvqa
from mgm_exp.evaluate.readers import read_json_lines

UNSEEN, RARE, FREQUENT = "unseen", "rare", "frequent"


def variants(benchmark: Benchmark, section: RobustnessConfig) -> Iterator[Benchmark]:
    """The benchmark with every corruption at every severity, and in other words, as benchmarks of their own.

    Raises:
        DataError: the file of rephrased questions is missing or faulty.
    """
    for kind in section.corruptions:
        for severity in section.severities:
            yield benchmark.corrupted(Corruption(kind.value, severity))
    if section.rephrased is not None:
        path = Path(section.rephrased).expanduser() / f"{benchmark.name}.jsonl"
        if not path.is_file():
            raise DataError(
                f"eval.robustness.rephrased={section.rephrased} holds no {path.name}, and {benchmark.name} is to be "
                "asked in other words.",
                advice='Give a folder with that file: lines of {"question_id": ..., "question": ...}.',
            )
        yield benchmark.rephrased(read_rephrased(path))


def read_rephrased(path: Path) -> dict[str, str]:
    """Question id (as a text) -> other words, from lines of ``{"question_id", "question"}``.

    Raises:
        DataError: a line is faulty, an id comes twice, or there is none.
    """
    texts: dict[str, str] = {}
    faults = []
    for number, row in read_json_lines(path):
        name, text = row.get("question_id"), row.get("question")
        if not isinstance(name, (int, str)) or not isinstance(text, str) or not text.strip():
            faults.append(f"line {number}: question_id and question are needed")
        elif str(name) in texts:
            faults.append(f"line {number}: question_id {name} comes twice")
        else:
            texts[str(name)] = text
    refuse(faults, f"{path}: lines that cannot be used:", "Repair them or take them out.")
    if not texts:
        raise DataError(f"{path} holds no question.")
    return texts


def answer_counts(training_rows: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """How often each answer, in M4C's normal form, occurs in LLaVA conversations."""
    turns = (turn for row in training_rows for turn in row["conversations"])
    return Counter(normalize_textvqa(turn["value"]) for turn in turns if turn["from"] != "human")


def familiarity(answers: Sequence[str], counts: Mapping[str, int], rare_at_most: int) -> str:
    """How well training knows the answer that most people gave: unseen, rare or frequent.

    Args:
        answers: Reference answers of a question.
        counts: Of :func:`answer_counts`.
        rare_at_most: Occurrences up to which an answer is a rare one.
    """
    normal = Counter(map(normalize_textvqa, answers))
    usual = min(normal, key=lambda answer: (-normal[answer], answer))
    seen = counts.get(usual, 0)
    return UNSEEN if seen == 0 else RARE if seen <= rare_at_most else FREQUENT


def long_tail(rows: Iterable[Mapping[str, Any]], counts: Mapping[str, int], rare_at_most: int) -> dict[str, float]:
    """Accuracy by familiarity of the wanted answer, and how many questions each class has.

    Args:
        rows: Lines of ``predictions.jsonl`` with their scores.
        counts, rare_at_most: As for :func:`familiarity`.

    Returns:
        ``answer[unseen]``, ``answer_n[unseen]`` and so on, for the classes that occur.
    """
    scores: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        scores[familiarity(row["answers"], counts, rare_at_most)].append(row["score"])
    found: dict[str, float] = {}
    for kind in (UNSEEN, RARE, FREQUENT):
        if scores[kind]:
            found |= {f"answer[{kind}]": mean(scores[kind]), f"answer_n[{kind}]": float(len(scores[kind]))}
    return found
