"""What the numbers say, in sentences: each finding is one statement with its numbers, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mgm_exp.data.exploration.numbers import counted, interval, number, ratio, share, size

Level = Literal["good", "note", "warning", "problem"]
_ORDER: dict[Level, int] = {"problem": 0, "warning": 1, "note": 2, "good": 3}


@dataclass(frozen=True)
class Finding:
    """One statement about the data.

    Args:
        level: How much it matters.
        sentence: The statement, with its numbers.
        more: What it means, and what to do.
    """

    level: Level
    sentence: str
    more: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def findings_of(content: dict[str, Any]) -> list[Finding]:
    """The findings on a dataset, what matters most first.

    Args:
        content: ``explore.json``.
    """
    found = [*_rows(content), *_images(content), *_lengths(content), *_repeats(content), *_variety(content)]
    found += [*_tokens(content), *_languages(content), *_similarity(content)]
    return sorted(found, key=lambda finding: _ORDER[finding.level])


def _rows(content: dict[str, Any]) -> Iterator[Finding]:
    bad = sum(content["bad_rows"].values())
    if bad:
        kinds = ", ".join(f"{kind} ({count:,})" for kind, count in content["bad_rows"].items())
        yield Finding(
            "problem",
            f"{counted(bad, 'row')} of {content['rows']:,} ({share(bad / content['rows'])}) cannot be read as a row: "
            f"{kinds}.",
            "They are counted here and left out of everything below. mgm-exp validate names each with its line.",
        )
    if content["sample"] is not None:
        sample = content["sample"]
        yield Finding(
            "note",
            f"Everything below is of a random sample of {sample['rows']:,} of {sample['of']:,} rows.",
            "Shares and means carry the error of a sample; duplicates across the whole data cannot be seen in it.",
        )
    if content["recaptioned_rows"]:
        yield Finding(
            "note",
            f"{counted(content['recaptioned_rows'], 'row brings', 'rows bring')} the caption that was replaced by "
            "another.",
            "What is described here are the new captions.",
        )


def _images(content: dict[str, Any]) -> Iterator[Finding]:
    images = content["images"]
    if images is None:
        return
    unusable = images["missing"] + images["broken"]
    if unusable:
        kinds = ", ".join(f"{kind} ({count:,})" for kind, count in images["faults"].items())
        yield Finding(
            "problem",
            f"{counted(unusable, 'image')} of {images['count']:,} ({share(unusable / images['count'])}) cannot be "
            f"used: {kinds}.",
            "A run leaves their rows out and counts them. mgm-exp validate names each one; validate --fix writes a "
            "copy without.",
        )
    elif images["count"]:
        formats = ", ".join(f"{name} ({share(count / images['usable'])})" for name, count in images["formats"].items())
        yield Finding(
            "good",
            f"All {images['count']:,} images open and decode to their end: {formats}.",
            f"They take {size(images['bytes_total'])}, {size(images['bytes_mean'])} each, and measure "
            f"{images['width_mean']:.0f} x {images['height_mean']:.0f} pixels on average.",
        )
    if images["duplicate_images"]:
        of_bytes = images["identical_groups"]
        yield Finding(
            "warning" if images["duplicate_images"] > 0.01 * images["count"] else "note",
            f"{counted(images['duplicate_images'], 'image looks', 'images look')} like another one: "
            f"{counted(images['duplicate_groups'], 'picture')} in several copies, {of_bytes:,} of them byte for byte.",
            "Split by image, not by row, or the same picture is trained on and tested with: mgm-exp split does.",
        )
    if images["blank"]:
        yield Finding(
            "warning" if images["blank"] > 0.01 * images["count"] else "note",
            f"{counted(images['blank'], 'image shows', 'images show')} next to nothing (hardly any contrast).",
            "No caption can be true of them; look at them below.",
        )
    if images["rows_without_image"]:
        yield Finding("note", f"{counted(images['rows_without_image'], 'row has', 'rows have')} no image.")


def _lengths(content: dict[str, Any]) -> Iterator[Finding]:
    text = content["text"]
    if not text["captions"]:
        yield Finding("problem", "No row has a caption or an answer.")
        return
    yield Finding(
        "note",
        f"A caption has {number(text['words_mean'])} words on average (median {number(text['words_median'])}, standard "
        f"deviation {number(text['words_std'])}) and {number(text['characters_mean'])} characters.",
        f"Counted without special tokens, over {text['captions']:,} captions. Half of them have between "
        f"{number(text['words_percentiles']['25'])} and {number(text['words_percentiles']['75'])} words.",
    )
    short = text["too_short_share"]
    if short > 0:
        level: Level = "problem" if short > 0.3 else "warning" if short > 0.01 else "note"
        empty = f" {counted(text['empty'], 'is', 'are')} empty." if text["empty"] else ""
        yield Finding(
            level,
            f"{share(short)} of captions have fewer than 4 words: "
            f"{counted(round(short * text['captions']), 'caption')}.",
            f"So little hardly describes an image.{empty} Recaptioning them, or a limit on words, is the usual remedy.",
        )
    else:
        yield Finding("good", "No caption has fewer than 4 words.")
    unseen = {
        noun: facts["long_enough_share"]
        for name, noun in (("word_10", "words"), ("character_10", "characters"))
        if (facts := text["repetition"][name])["long_enough_share"] < 0.5
    }
    if unseen:
        shares = " and ".join(f"{share(1 - value)} over 10 {noun}" for noun, value in unseen.items())
        yield Finding(
            "note",
            f"Data-Juicer's repetition filters with their defaults would pass over most captions unseen: {shares}.",
            "Shorter captions have no n-gram of that length. Ours measure 2 words and 5 characters.",
        )


def _repeats(content: dict[str, Any]) -> Iterator[Finding]:
    text = content["text"]
    if text["duplicate_share"]:
        top = text["duplicates"]["largest"][0]
        yield Finding(
            "warning" if text["duplicate_share"] > 0.05 else "note",
            f"{share(text['duplicate_share'])} of captions are a copy of another one; the most frequent, "
            f"\u201c{_short(top['text'])}\u201d, stands {top['captions']:,} times.",
            "The same text for different images teaches the model to answer without looking.",
        )
    elif text["duplicate_share"] == 0:
        yield Finding("good", "No two captions are equal.")
    near = text["near_duplicates"]
    if near["captions"]:
        yield Finding(
            "note",
            f"{counted(near['captions'], 'more caption says', 'more captions say')} nearly the same as another "
            f"({share(near['threshold'])} of words and word pairs in common), in {counted(near['groups'], 'group')}.",
            "Templates and serial titles show up like this.",
        )


def _variety(content: dict[str, Any]) -> Iterator[Finding]:
    text = content["text"]
    if text["mattr_50"] is None:
        return
    around = interval(text["mattr_50_interval"]["ci_low"], text["mattr_50_interval"]["ci_high"])
    at = [f"{ratio(estimate['value'])} at {int(size_):,} words" for size_, estimate in text["ttr_at"].items()]
    naive = text["distinct_1"]
    yield Finding(
        "note",
        f"Of 50 words in a row {ratio(text['mattr_50'])} are distinct (MATTR-50"
        + (f", 95 % interval {around})." if around else ")."),
        f"This can be compared with other data of any size. The plain ratio of distinct to all words, {ratio(naive)} "
        "here "
        f"({text['vocabulary']:,} of {text['tokens']:,}), cannot: it falls as data grows"
        + (f", on this very data: {', '.join(at)}." if len(at) > 1 else "."),
    )
    folded = text["case_folded"]["vocabulary"]
    if folded < 0.97 * text["vocabulary"]:
        yield Finding(
            "note",
            f"{share(1 - folded / text['vocabulary'])} of the vocabulary is the same word in other letters (Sign, "
            "sign, SIGN).",
            "Compare diversity with data written in lower case by the values under case_folded.",
        )


def _tokens(content: dict[str, Any]) -> Iterator[Finding]:
    lengths = content["text"]["token_lengths"]
    if lengths is None:
        return
    limit = lengths["model_max_length"]
    if limit is not None and lengths["truncated_share"]:
        yield Finding(
            "problem",
            f"{share(lengths['truncated_share'])} of captions are longer than the model's {limit:,} tokens by "
            "themselves.",
            "Their ends are never learnt. The prompt and the image take more of that room.",
        )
    elif limit is not None:
        yield Finding(
            "good",
            f"The longest caption has {lengths['max']:,} tokens; the model takes {limit:,}.",
            f"On average {number(lengths['mean'])} tokens; the prompt and the image come on top.",
        )


def _languages(content: dict[str, Any]) -> Iterator[Finding]:
    languages = {name: value for name, value in content["text"]["languages"].items() if name != "undecided"}
    if not languages:
        return
    main, value = next(iter(languages.items()))
    others = sum(languages.values()) - value
    if others > 0.02:
        names = ", ".join(f"{name} ({share(part)})" for name, part in list(languages.items())[1:4])
        yield Finding(
            "warning",
            f"{share(others)} of captions look like another language than {main}: {names}.",
            "A guess from function words and scripts; look at some before acting on it.",
        )


def _similarity(content: dict[str, Any]) -> Iterator[Finding]:
    similarity = content["similarity"]
    if similarity is None or similarity["mean"] is None:
        return
    yield Finding(
        "note",
        f"{similarity['scorer']} gives captions and their images a score of {similarity['mean']:.3f} on average; the "
        "worst "
        f"5 % lie below {similarity['percentiles']['5']:.3f}.",
        "Those are listed below. Scores of one scorer cannot be compared with those of another.",
    )


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
