"""Explores a dataset: reads every row once, looks at every image once, and counts.

exploration = explore(find_source("pairs.jsonl"))
exploration.content                     # explore.json, see docs/exploration.md
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mgm_exp.data.exploration.captions import RepeatedCaptions, describe_text, repeated_captions
from mgm_exp.data.exploration.columns import Rows
from mgm_exp.data.exploration.image_facts import ImageFacts, measure_images
from mgm_exp.data.exploration.images import ImageGroups, image_groups, image_statistics
from mgm_exp.data.exploration.language import guess_languages
from mgm_exp.data.exploration.processes import WorkerPool
from mgm_exp.data.exploration.reading import OnProgress, Options, Values, read_captions
from mgm_exp.data.exploration.similarity import describe_similarity, with_similarity
from mgm_exp.data.formats import Location
from mgm_exp.errors import DataError

if TYPE_CHECKING:
    import numpy as np

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Exploration:
    """The result: numbers to write down, and what plots and galleries are made of.

    Args:
        name: Of the dataset.
        location: Where it lies.
        content: ``explore.json``.
        rows: The rows as columns.
        values: Of every caption.
        languages: For each caption the place of its language in ``language_names``.
        repeated: Captions that occur more than once.
        image_rows: First row of each distinct image.
        row_image: For each row the place of its image, -1: none.
        facts, groups: Of the distinct images; None where images were not looked at.
    """

    name: str
    location: Location
    content: dict[str, Any]
    rows: Rows
    values: Values
    languages: np.ndarray
    language_names: list[str]
    repeated: RepeatedCaptions
    image_rows: np.ndarray
    row_image: np.ndarray
    facts: ImageFacts | None = None
    groups: ImageGroups | None = None

    def caption(self, place: int) -> str:
        """A caption; white space inside it is one blank each."""
        import numpy as np

        stream = self.values.stream
        return " ".join(stream.vocabulary[word] for word in stream.take(np.array([place])))

    def row_of(self, place: int) -> int:
        """The row that a caption belongs to."""
        return int(self.rows.text_row[place])

    def image(self, place: int) -> str:
        """Path of a distinct image."""
        return self.rows.images[int(self.image_rows[place])]


def explore(location: Location, options: Options | None = None, on_progress: OnProgress | None = None) -> Exploration:
    """Explores one dataset.

    Args:
        location: Its rows and images.
        options: What is measured.
        on_progress: Called with (what, done, expected in all) now and then.

    Raises:
        DataError: the rows cannot be read at all, or none of them is one.
    """
    import numpy as np

    options = options or Options()
    progress = on_progress or (lambda what, done, total: None)
    began = time.perf_counter()
    seconds: dict[str, float] = {}

    def took(what: str) -> None:
        seconds[what] = round(time.perf_counter() - began - sum(seconds.values()), 3)

    with WorkerPool(options.workers) as pool:
        rows, values = read_captions(location, options, pool, progress)
        if not len(rows):
            kinds = ", ".join(f"{kind} ({number})" for kind, number in rows.bad.most_common(3))
            raise DataError(
                f"{location.path} holds no row that can be used; of {rows.total} none is a row: {kinds}.",
                advice=f"mgm-exp validate {location.path} names every one.",
            )
        took("captions")
        image_rows, row_image = rows.distinct_images()
        facts = groups = None
        if options.with_images and len(image_rows):
            facts, groups = _look_at_images(location, rows, image_rows, options, pool, progress)
            took("images")
    if options.scorer is not None and facts is not None:
        values = with_similarity(location, rows, values, facts, row_image, options, progress)
        took("similarity")
    progress("compare captions", 0, 1)
    languages, names = guess_languages(values.stream)
    repeated = repeated_captions(values)
    text = describe_text(values, languages, names, repeated, seed=options.seed, max_length=options.max_length)
    progress("compare captions", 1, 1)
    took("comparing captions")

    content: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "name": _name(location),
        "rows": rows.total,
        "usable_rows": len(rows),
        "bad_rows": dict(rows.bad.most_common()),
        "recaptioned_rows": rows.recaptioned,
        "sample": None if options.sample is None else {"rows": len(rows), "of": rows.total, "seed": options.seed},
        "text": text,
        "images": None,
        "similarity": describe_similarity(values, options.scorer),
    }
    if facts is not None and groups is not None:
        used = np.bincount(row_image[row_image >= 0])
        content["images"] = image_statistics(facts, groups, int((row_image < 0).sum()), int((used > 1).sum()))
    content["seconds"] = seconds
    return Exploration(
        name=_name(location),
        location=location,
        content=content,
        rows=rows,
        values=values,
        languages=languages,
        language_names=names,
        repeated=repeated,
        image_rows=image_rows,
        row_image=row_image,
        facts=facts,
        groups=groups,
    )


def _look_at_images(
    location: Location, rows: Rows, image_rows: np.ndarray, options: Options, pool: WorkerPool, on_progress: OnProgress
) -> tuple[ImageFacts, ImageGroups]:
    total = len(image_rows)
    facts = measure_images(
        location.image_root,
        (rows.images[row] for row in image_rows.tolist()),
        total,
        pool,
        max_megapixels=options.max_megapixels,
        on_progress=lambda done: on_progress("look at images", done, total),
    )
    on_progress("compare images", 0, 1)
    groups = image_groups(facts)
    on_progress("compare images", 1, 1)
    return facts, groups


def _name(location: Location) -> str:
    path = location.path.resolve()
    return path.name if path.is_dir() else f"{path.parent.name}/{path.name}"
