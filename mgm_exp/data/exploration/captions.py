"""The ``text`` of ``explore.json``: the core statistics, and everything else that is known of the captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from mgm_exp.data.exploration.diversity import distinct, moving_average_ttr, vocabulary_growth
from mgm_exp.data.exploration.language import says_something
from mgm_exp.data.exploration.near_duplicates import THRESHOLD, near_duplicate_groups
from mgm_exp.data.exploration.reading import Values
from mgm_exp.data.exploration.text import PERCENTILES, core_statistics
from mgm_exp.data.exploration.tokens import TokenStream

if TYPE_CHECKING:
    import numpy as np

_TOP_WORDS = 40
_EXAMPLES = 12


@dataclass(frozen=True)
class RepeatedCaptions:
    """Captions that occur more than once, as groups of places, largest first.

    Args:
        equal: Equal in every character.
        near: Different captions that say nearly the same; of equal ones the first stands for all.
        distinct: Captions that differ from each other.
    """

    equal: list[list[int]]
    near: list[list[int]]
    distinct: int


def repeated_captions(values: Values) -> RepeatedCaptions:
    """Finds captions that occur more than once or nearly so."""
    import numpy as np

    order = np.argsort(values.hashes, kind="stable")
    ordered = values.hashes[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(order)])
    sizes = np.diff(starts, append=len(order))
    many = np.flatnonzero(sizes > 1)
    equal = [order[starts[i] : starts[i] + sizes[i]].tolist() for i in many.tolist()]
    near = near_duplicate_groups(values.stream.case_folded(), np.sort(order[starts]))
    return RepeatedCaptions(sorted(equal, key=lambda group: (-len(group), group[0])), near, len(starts))


def describe_text(
    values: Values,
    languages: np.ndarray,
    language_names: list[str],
    repeated: RepeatedCaptions,
    *,
    seed: int,
    max_length: int | None,
) -> dict[str, Any]:
    """The ``text`` of ``explore.json``.

    Args:
        values: Of every caption.
        languages, language_names: As guessed.
        repeated: See :func:`repeated_captions`.
        seed: Of the subsamples that diversity is measured on.
        max_length: Longest sequence of the model, in tokens.
    """
    import numpy as np

    stream, table = values.stream, values.table
    folded = stream.case_folded()
    repetition = {f"word_{n}": (column, table.words >= n) for n, column in table.word_repetition.items()} | {
        f"character_{n}": (column, table.text_length >= n) for n, column in table.character_repetition.items()
    }
    return {
        **core_statistics(stream, table.text_length, repeated.distinct, seed=seed),
        "case_folded": {
            "vocabulary": len(folded.vocabulary),
            "mattr_50": moving_average_ttr(folded, draws=1, seed=seed).value,
            "distinct_1": distinct(folded, 1),
        },
        "words_num": {"mean": _mean(table.words), "percentiles": _percentiles(table.words)},
        "sentences": {
            "mean": _mean(values.sentences),
            "several_share": _mean(values.sentences > 1),
            "max": int(values.sentences.max(initial=0)),
        },
        "special_characters": {
            "mean": _mean(table.special_characters),
            "percentiles": _percentiles(table.special_characters),
        },
        "repetition": {
            name: {
                "mean": _mean(column),
                "above_zero_share": _mean(column > 0),
                "long_enough_share": _mean(is_long_enough),
                "percentiles": _percentiles(column),
            }
            for name, (column, is_long_enough) in repetition.items()
        },
        "languages": _shares(languages, language_names),
        "top_words": _top_words(folded, is_wanted=lambda word: True),
        "top_content_words": _top_words(folded, is_wanted=says_something),
        "vocabulary_growth": vocabulary_growth(stream, seed=seed),
        "token_lengths": _token_lengths(values.tokens, max_length),
        "duplicates": {
            "captions": sum(len(group) - 1 for group in repeated.equal),
            "groups": len(repeated.equal),
            "largest": _largest(stream, repeated.equal),
        },
        "near_duplicates": {
            "threshold": THRESHOLD,
            "captions": sum(len(group) - 1 for group in repeated.near),
            "groups": len(repeated.near),
            "largest": _largest(stream, repeated.near),
        },
        "words_histogram": np.bincount(np.minimum(stream.counts, 200)).tolist() if stream.captions else [],
    }


def _token_lengths(tokens: np.ndarray | None, max_length: int | None) -> dict[str, Any] | None:
    if tokens is None:
        return None
    return {
        "mean": _mean(tokens),
        "max": int(tokens.max(initial=0)),
        "total": int(tokens.sum()),
        "percentiles": _percentiles(tokens),
        "model_max_length": max_length,
        "truncated_share": None if max_length is None else _mean(tokens > max_length),
    }


def _largest(stream: TokenStream, groups: list[list[int]]) -> list[dict[str, Any]]:
    import numpy as np

    def caption(place: int) -> str:
        return " ".join(stream.vocabulary[word] for word in stream.take(np.array([place])))

    return [{"captions": len(group), "text": caption(group[0])} for group in groups[:_EXAMPLES]]


def _top_words(stream: TokenStream, is_wanted: Callable[[str], bool]) -> list[dict[str, Any]]:
    import numpy as np

    counts = stream.frequencies()
    order = np.argsort(-counts, kind="stable").tolist()
    words = ((stream.vocabulary[place], int(counts[place])) for place in order if is_wanted(stream.vocabulary[place]))
    return [{"word": word, "count": count} for word, count in islice(words, _TOP_WORDS)]


def _shares(places: np.ndarray, names: list[str]) -> dict[str, float]:
    counts = Counter(places.tolist())
    return {names[place]: count / len(places) for place, count in counts.most_common()}


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _percentiles(values: np.ndarray) -> Mapping[str, float]:
    import numpy as np

    return {str(p): float(np.percentile(values, p)) for p in PERCENTILES} if len(values) else {}
