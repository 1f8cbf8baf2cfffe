"""How well captions fit their images, where the user gives a local CLIP (or BLIP matching) folder."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mgm_exp.data.exploration.columns import Rows
from mgm_exp.data.exploration.image_facts import ImageFacts
from mgm_exp.data.exploration.reading import OnProgress, Options, Values
from mgm_exp.data.exploration.text import PERCENTILES
from mgm_exp.data.formats import Location
from mgm_exp.data.images import open_image

if TYPE_CHECKING:
    import numpy as np

    from mgm_exp.data.scoring import ImageTextScorer

_AT_ONCE = 32


def with_similarity(
    location: Location,
    rows: Rows,
    values: Values,
    facts: ImageFacts,
    row_image: np.ndarray,
    options: Options,
    on_progress: OnProgress,
) -> Values:
    """The values with a score of every caption whose image can be used; NaN for the others."""
    import numpy as np

    assert options.scorer is not None
    scores = np.full(values.stream.captions, np.nan, dtype=np.float32)
    image_of = row_image[rows.text_row]
    judged = np.flatnonzero((image_of >= 0) & facts.is_usable[np.maximum(image_of, 0)])
    stream = values.stream
    for start in range(0, len(judged), _AT_ONCE):
        places = judged[start : start + _AT_ONCE]
        images = [
            open_image(location.image_root, rows.images[int(rows.text_row[place])], options.max_megapixels)
            for place in places
        ]
        texts = [[" ".join(stream.vocabulary[word] for word in stream.take(np.array([place])))] for place in places]
        scores[places] = [score[0] for score in options.scorer.score(images, texts)]
        on_progress("judge captions", start + len(places), len(judged))
    return replace(values, similarity=scores)


def describe_similarity(values: Values, scorer: ImageTextScorer | None) -> dict[str, Any] | None:
    """The ``similarity`` of ``explore.json``; None where nothing was judged."""
    import numpy as np

    if values.similarity is None or scorer is None:
        return None
    from mgm_exp.data.scoring import BlipMatchingScorer

    judged = values.similarity[np.isfinite(values.similarity)]
    return {
        "scorer": scorer.name,
        "operator": "image_text_matching" if isinstance(scorer, BlipMatchingScorer) else "image_text_similarity",
        "captions": len(judged),
        "mean": float(judged.mean()) if len(judged) else None,
        "percentiles": {str(p): float(np.percentile(judged, p)) for p in PERCENTILES} if len(judged) else {},
    }
