"""GQA's own scores: accuracy with its breakdown, validity, plausibility, consistency and distribution.

Everything but consistency is taken over the balanced questions, as in the official evaluator.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

_NOT_A_STEP = ("exist", "query: name", "choose name")
_COMMON = ("color", "material", "shape")


def gqa_prediction(text: str) -> str:
    """An answer as LLaVA hands it to the GQA evaluator: no periods at its end, lower case, and nothing else.

    A leading space or "the" makes an answer wrong there, and here.
    """
    return text.rstrip(".").lower()


def steps_of(question: Mapping[str, Any]) -> int:
    """Reasoning steps: operations of the functional program that do more than look up a name or existence."""
    operations = (f"{step['operation']}: {step['argument']}" for step in question["semantic"])
    return sum(not any(word in operation for word in _NOT_A_STEP) for operation in operations)


def _is_among(answer: str, group: Sequence[str], question: Mapping[str, Any]) -> bool:
    # Kept as it is in the official code: for "...Common" questions the group is replaced by the names of attributes.
    return answer in (_COMMON if "Common" in question["types"]["detailed"] else group)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _consistency(
    question_id: str, questions: Mapping[str, Mapping[str, Any]], is_right: Mapping[str, bool]
) -> float | None:
    """Share of right answers among the questions that a rightly answered one entails; None where there is none."""
    entailed = [other for other in questions[question_id]["entailed"] if other != question_id]
    if not is_right[question_id] or not entailed:
        return None
    return _mean([float(is_right[other]) for other in entailed])


def _distribution(pairs: Sequence[tuple[str, str, str]]) -> float:
    """Chi-square of the answers given against those wanted, by global group, weighted by its size, over 100.

    Args:
        pairs: (group, wanted answer, given answer).
    """
    wanted: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    given: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for group, gold, answer in pairs:
        wanted[group][gold] += 1
        given[group][answer] += 1
    total, weighted = 0, 0.0
    for group, counts in wanted.items():
        size = sum(counts.values())
        # Answers that nobody wanted do not count: the sum runs over the wanted ones.
        chi = sum((given[group].get(gold, 0) - n) ** 2 / n for gold, n in counts.items())
        weighted += chi * size
        total += size
    return weighted / total / 100 if total else 0.0


def gqa(
    predictions: Mapping[str, str],
    questions: Mapping[str, Mapping[str, Any]],
    choices: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    *,
    consistency: bool = False,
) -> dict[str, float]:
    """GQA's scores, in 0..1 but for ``distribution`` (0 and up, lower is better).

    Args:
        predictions: Question id -> answer, in the form of :func:`gqa_prediction`.
        questions: Question id -> the question as in GQA's question files.
        choices: Question id -> ``{"valid": [...], "plausible": [...]}``; None: validity and plausibility are left out.
        consistency: Whether to score entailed questions too. All of them must be in ``questions`` and answered.

    Returns:
        ``accuracy``, ``binary``, ``open``, ``distribution``; ``structural[...]``, ``semantic[...]``, ``words[...]``,
        ``steps[...]``: accuracy of a kind of questions; and where asked for ``validity``, ``plausibility``,
        ``consistency``.

    Raises:
        ValueError: a question, or one that it entails, has no prediction, or no question is balanced.

    Source: Hudson and Manning 2019, and their ``eval.py``. Grounding needs attention maps and is not scored.
    """
    missing = [question_id for question_id in questions if question_id not in predictions]
    if missing:
        raise ValueError(f"{len(missing)} GQA questions have no prediction, the first is {missing[0]}")
    is_right = {question_id: predictions[question_id] == q["answer"] for question_id, q in questions.items()}
    found: dict[str, list[float]] = defaultdict(list)
    pairs: list[tuple[str, str, str]] = []
    for question_id, question in questions.items():
        if not question["isBalanced"]:
            continue
        score, types = float(is_right[question_id]), question["types"]
        for name in (
            "accuracy",
            "open" if types["structural"] == "query" else "binary",
            f"structural[{types['structural']}]",
            f"semantic[{types['semantic']}]",
            f"words[{len(question['question'].split())}]",
            f"steps[{steps_of(question)}]",
        ):
            found[name].append(score)
        answer = predictions[question_id]
        if choices is not None:
            allowed = choices[question_id]
            found["validity"].append(float(_is_among(answer, allowed["valid"], question)))
            found["plausibility"].append(float(_is_among(answer, allowed["plausible"], question)))
        if consistency:
            unknown = [other for other in question["entailed"] if other not in is_right]
            if unknown:
                raise ValueError(f"GQA question {question_id} entails {unknown[0]}, which is not among the questions")
            value = _consistency(question_id, questions, is_right)
            if value is not None:
                found["consistency"].append(value)
        group = question["groups"]["global"]
        if group is not None:
            pairs.append((group, question["answer"], answer))
    if not found:
        raise ValueError("none of the GQA questions is balanced: only balanced ones are scored")
    if consistency:
        found.setdefault("consistency", [])
    scores = {name: _mean(values) for name, values in found.items()}
    scores["distribution"] = _distribution(pairs)
    return scores
