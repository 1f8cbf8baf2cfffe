"""Caption metrics over a corpus: BLEU-4, ROUGE-L and CIDEr-D as pycocoevalcap computes them, without Java.

Texts are split on white space; give them tokenised (lower case, punctuation apart) to be comparable with published
numbers, which use the Penn Treebank tokeniser. Scores with other tokenisers are other scores.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

_MAX_N = 4
_TINY, _SMALL = 1e-15, 1e-9
_CIDER_SIGMA = 6.0
_ROUGE_BETA = 1.2

NGrams = Counter[tuple[str, ...]]


def _ngrams(words: Sequence[str]) -> list[NGrams]:
    """Counts of the 1-, 2-, 3- and 4-grams."""
    return [Counter(zip(*(words[k:] for k in range(n)), strict=False)) for n in range(1, _MAX_N + 1)]


def _corpus(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[tuple[list[str], list[list[str]]]]:
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} lists of references were given: a corpus score "
            "needs as many lists as predictions, and at least one"
        )
    corpus = []
    for place, (prediction, texts) in enumerate(zip(predictions, references, strict=True)):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"references[{place}] must be a list of at least one text, not {texts!r}")
        corpus.append((prediction.split(), [text.split() for text in texts]))
    return corpus


def bleu4(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 in 0..1 with the closest reference length (Papineni et al. 2002; pycocoevalcap ``Bleu_4``).

    Raises:
        ValueError: lengths differ, or a prediction has no reference.
    """
    correct, possible = [0] * _MAX_N, [0] * _MAX_N
    written, closest = 0, 0
    for words, texts in _corpus(predictions, references):
        written += len(words)
        closest += min((len(text) for text in texts), key=lambda length: (abs(length - len(words)), length))
        reference_counts = [_ngrams(text) for text in texts]
        for n, counts in enumerate(_ngrams(words)):
            most: NGrams = Counter()
            for of_reference in reference_counts:
                most |= of_reference[n]
            correct[n] += sum((counts & most).values())
            possible[n] += max(0, len(words) - n)
    product = 1.0
    for right, total in zip(correct, possible, strict=True):
        product *= (right + _TINY) / (total + _SMALL)
    ratio = (written + _TINY) / (closest + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return float(product ** (1 / _MAX_N) * brevity)


def _longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    row = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for j, other in enumerate(right, 1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean ROUGE-L in 0..1, beta 1.2, best precision and best recall taken separately (Lin 2004; pycocoevalcap).

    Raises:
        ValueError: lengths differ, or a prediction has no reference.
    """
    total = 0.0
    corpus = _corpus(predictions, references)
    for words, texts in corpus:
        common = [_longest_common_subsequence(text, words) for text in texts]
        precision = max(common) / len(words) if words else 0.0
        recall = max(c / len(text) if text else 0.0 for c, text in zip(common, texts, strict=True))
        if precision and recall:
            total += (1 + _ROUGE_BETA**2) * precision * recall / (recall + _ROUGE_BETA**2 * precision)
    return total / len(corpus)


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D of a corpus (about 0..10; one image alone scores 0, because the weights come from the references).

    Raises:
        ValueError: lengths differ, or a prediction has no reference.

    Source: Vedantam et al. 2015; pycocoevalcap ``CiderScorer`` (no stemming, length penalty on bigram counts).
    """
    corpus = _corpus(predictions, references)
    counted = [(_ngrams(words), [_ngrams(text) for text in texts]) for words, texts in corpus]
    frequency: Counter[tuple[str, ...]] = Counter()
    for _, texts in counted:
        frequency.update({gram for counts in texts for of_length in counts for gram in of_length})
    log_images = math.log(len(corpus))

    def weigh(counts: NGrams) -> dict[tuple[str, ...], float]:
        return {gram: count * (log_images - math.log(max(1, frequency[gram]))) for gram, count in counts.items()}

    total = 0.0
    for of_prediction, texts in counted:
        hypothesis = [weigh(counts) for counts in of_prediction]
        score = 0.0
        for of_reference in texts:
            delta = sum(of_prediction[1].values()) - sum(of_reference[1].values())
            penalty = math.exp(-(delta**2) / (2 * _CIDER_SIGMA**2))
            for n in range(_MAX_N):
                score += penalty * _similarity(hypothesis[n], weigh(of_reference[n]))
        total += 10 * score / (_MAX_N * len(texts))
    return total / len(corpus)


def _similarity(hypothesis: dict[tuple[str, ...], float], reference: dict[tuple[str, ...], float]) -> float:
    """Clipped cosine of two weighted n-gram counts."""
    product = sum(
        min(weight, reference[gram]) * reference[gram] for gram, weight in hypothesis.items() if gram in reference
    )
    norms = math.sqrt(sum(w * w for w in hypothesis.values())) * math.sqrt(sum(w * w for w in reference.values()))
    return product / norms if norms else product
