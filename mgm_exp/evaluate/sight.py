"""Visual tokens of the images that are asked about: each image is decoded, resized and encoded once.

Once for all questions about it, for all adapters that share the connector (the towers' part also for those that do
not), and, as far as memory allows, for all benchmarks of a call. Images go through the towers in groups of one size,
the last one filled up, so that an image's tokens are the same whatever else was asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from mgm_exp.evaluate.answerer import Answerer, Pixels
from mgm_exp.evaluate.fitting import Fit

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from mgm_exp.evaluate.kept import KeptSight

GROUP = 8
"""Images in one pass through the towers: enough to fill a GPU at 768 px, and some 8 GB of memory there."""
_THREADS = 4


class Shelf:
    """Tokens that a later benchmark of the same call may need, in main memory.

    Args:
        limit_bytes: What comes when it is full is not kept, and encoded anew where it is needed again.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._room = limit_bytes
        self._kept: dict[tuple[str, str], Tensor] = {}

    def get(self, eyes: str, image: str) -> Tensor | None:
        """What these eyes saw of the image, if it was kept."""
        return self._kept.get((eyes, image))

    def put(self, eyes: str, image: str, tokens: Tensor) -> None:
        """Keeps a copy while there is room."""
        size = tokens.numel() * tokens.element_size()
        if size <= self._room and (eyes, image) not in self._kept:
            self._room -= size
            self._kept[eyes, image] = tokens.detach().to("cpu", copy=True)


class Sight:
    """What several models see of the images of one pass over a benchmark.

    Args:
        answerers: The models.
        picture: Opens an image by its name in the benchmark.
        passes: The images of each batch that will be asked, in order.
        fit: How many images go through the towers at a time.
        shelf: What other benchmarks of the call saw, and will see.
        shelf_name: The name of an image there: the same for the same file and corruption in every benchmark.
        kept: Features of the images that lie in the store, and take up those that do not; None: none are kept.
    """

    def __init__(
        self,
        answerers: Sequence[Answerer],
        picture: Callable[[str], Image],
        passes: Sequence[Iterable[str]],
        *,
        fit: Fit,
        shelf: Shelf | None = None,
        shelf_name: Callable[[str], str] = str,
        kept: KeptSight | None = None,
    ) -> None:
        self._picture, self._fit, self._shelf, self._shelf_name = picture, fit, shelf, shelf_name
        self._names = [answerer.eyes for answerer in answerers]
        self._eyes: Mapping[str, Answerer] = dict(zip(self._names, answerers, strict=True))
        used = [set(images) for images in passes]
        self._uses = Counter(image for images in used for image in images)
        self._upcoming = list(dict.fromkeys(image for images in passes for image in images))
        self._seen: dict[str, dict[str, Tensor]] = {}
        self._reading: dict[str, Future[Pixels]] = {}
        self._reader, self._kept = answerers[0], kept
        self._pool = ThreadPoolExecutor(_THREADS)

    def __enter__(self) -> Sight:
        self._read_ahead()
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._kept is not None:
            self._kept.close()

    def see(self, images: Sequence[str]) -> list[list[Tensor]]:
        """The tokens of each image, for each model; called once for each batch, in the order of the passes."""
        while any(image not in self._seen for image in images):
            self._encode(self._next_group())
        found = [[self._seen[image][name] for image in images] for name in self._names]
        for image in set(images):
            self._uses[image] -= 1
            if not self._uses[image]:
                del self._seen[image]
        return found

    def _next_group(self) -> list[str]:
        """The next images that nobody has seen; those on the shelf are taken from it on the way."""
        group: list[str] = []
        while self._upcoming and len(group) < self._fit.size:
            image = self._upcoming.pop(0)
            if not self._take_from_shelf(image):
                group.append(image)
        return group

    def _take_from_shelf(self, image: str) -> bool:
        if self._shelf is None:
            return False
        there = {name: self._shelf.get(name, self._shelf_name(image)) for name in self._eyes}
        kept = {name: tokens for name, tokens in there.items() if tokens is not None}
        if len(kept) < len(self._eyes):
            return False
        self._seen[image] = kept
        return True

    def _encode(self, group: list[str]) -> None:
        if not group:
            return
        self._read(group)
        for image in group:
            if image in self._reading:
                self._reading[image].result()
        self._read_ahead()
        with _towers_that_remember(self._eyes.values()):
            for image, seen in zip(group, self._fit.run(group, self._through_all), strict=True):
                self._reading.pop(image, None)
                self._seen[image] = dict(zip(self._eyes, seen, strict=True))
                if self._shelf is not None:
                    for name, tokens in self._seen[image].items():
                        self._shelf.put(name, self._shelf_name(image), tokens)

    def _through_all(self, images: Sequence[str]) -> list[tuple[Tensor, ...]]:
        """What each pair of eyes sees of each image. A group is filled up to its size: the size decides on the bits."""
        if self._kept is not None and self._kept.batch == self._fit.size:
            return self._kept.see(images, self._pixels_now)
        pixels = [self._pixels_now(image) for image in images]
        filled = [*pixels, *[pixels[-1]] * (self._fit.size - len(pixels))]
        seen = [answerer.see(filled)[: len(pixels)] for answerer in self._eyes.values()]
        return list(zip(*seen, strict=True))

    def _pixels_now(self, image: str) -> Pixels:
        if image not in self._reading:
            self._reading[image] = self._pool.submit(self._pixels, image)
        return self._reading[image].result()

    def _pixels(self, image: str) -> Pixels:
        return self._reader.pixels(self._picture(image))

    def _read_ahead(self) -> None:
        """Decodes the images of the next group while the model works on this one."""
        self._read([image for image in self._upcoming[: self._fit.size] if not self._is_kept(image)])

    def _read(self, images: Sequence[str]) -> None:
        for image in images:
            if image not in self._reading and (self._kept is None or self._kept.needs_pixels(image)):
                self._reading[image] = self._pool.submit(self._pixels, image)

    def _is_kept(self, image: str) -> bool:
        name = self._shelf_name(image)
        return self._shelf is not None and all(self._shelf.get(eyes, name) is not None for eyes in self._eyes)


@contextmanager
def _towers_that_remember(answerers: Iterable[Answerer]) -> Iterator[None]:
    """Towers that several models share run once for the same images: they give their last result again."""
    shared = Counter(tower for answerer in answerers for tower in answerer.towers)
    with ExitStack() as stack:
        for tower, count in shared.items():
            if count > 1:
                tower.forward = _Remembers(tower.forward)
                stack.callback(delattr, tower, "forward")
        yield


class _Remembers:
    """A function of one tensor (and plain options), and its last call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._given: Tensor | None = None
        self._words: dict[str, Any] = {}
        self._found: Any = None

    def __call__(self, given: Tensor, **words: Any) -> Any:
        before = self._given
        is_same = before is not None and before.shape == given.shape and bool((before == given).all())
        if not is_same or words != self._words:
            self._given, self._words, self._found = given, words, self._function(given, **words)
        return self._found
