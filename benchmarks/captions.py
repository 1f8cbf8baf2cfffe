"""Made-up captions for benchmarks: as long, as repetitive and as mixed as those of web pictures, the same every time.

Words follow Zipf's law over 30,000 of them; lengths have the mean (8.8 words) and the spread of the captions that
people recaption. One in fifty holds a number, one in a hundred a character beyond ASCII, one in two hundred a phrase
twice, one in a hundred is another one's copy.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

_ONSETS = "b c d f g h k l m n p r s t v w br cr dr fl gr pl sh st th tr".split()
_VOWELS = "a e i o u ai ea oo".split()
_ENDS = ["", "", "n", "r", "s", "t", "l", "ng", "ck"]
_VOCABULARY = 30_000
_BEYOND_ASCII = ["café", "naïve", "münchen", "–", "©", "“quoted”", "日本", "señor", "😀"]


def captions(n: int, seed: int = 0) -> list[str]:
    """``n`` captions."""
    rng = random.Random(seed)
    words = _words(rng)
    weights = [1 / (rank + 2.7) for rank in range(len(words))]
    lengths = [max(1, round(rng.gauss(8.8, 3.5))) for _ in range(n)]
    stream = iter(rng.choices(words, weights, k=sum(lengths)))
    made: list[str] = []
    for length in lengths:
        caption = [next(stream) for _ in range(length)]
        luck = rng.random()
        if luck < 0.02:
            caption.append(str(rng.randrange(3000)))
        elif luck < 0.03:
            caption.insert(rng.randrange(len(caption)), rng.choice(_BEYOND_ASCII))
        elif luck < 0.035:
            caption += caption
        text = " ".join(caption) + rng.choice(["", "", "", ".", " -", "!"])
        made.append(rng.choice(made) if luck > 0.99 and made else text)
    return made


def write_rows(path: Path, texts: list[str], image: str) -> Path:
    """The captions as Data-Juicer rows; ``{}`` in the image's path is the row's number."""
    with open(path, "w", encoding="utf-8") as file:
        for number, text in enumerate(texts):
            row = {
                "id": f"{number:09d}",
                "text": f"<__dj__image>\n{text} <|__dj__eoc|>",
                "images": [image.format(number)],
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


def _words(rng: random.Random) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < _VOCABULARY:
        syllables = rng.choices([1, 2, 3], [5, 4, 1])[0]
        found["".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_ENDS) for _ in range(syllables))] = None
    return list(found)
