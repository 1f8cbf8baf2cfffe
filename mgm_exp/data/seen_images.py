"""Which images of a dataset were checked, and what is known of them all, in some 40 bytes an image."""

from __future__ import annotations

import os
import posixpath
from collections import Counter, OrderedDict
from collections.abc import Iterable

from mgm_exp.data.formats.id_set import IdSet
from mgm_exp.data.image_checks import ImageChecks, Verdict
from mgm_exp.data.tar_members import SEPARATOR
from mgm_exp.data.validation_report import ImageSummary

_KNOWN_FAULTS = 10_000  # verdicts on unusable images that are kept; older ones are made again when they are needed
_EXAMPLES = 20  # of unused files
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_MOST_FOLDERS = 100_000


class SeenImages:
    """Verdicts on images that many rows may name: each usable one is decoded once, and only a hash of it is kept."""

    def __init__(self, checks: ImageChecks) -> None:
        self._checks = checks
        self._seen, self._usable = IdSet(), IdSet()
        self._faults: OrderedDict[str, Verdict] = OrderedDict()
        self._folders: set[str] | None = set()
        self._bytes = 0
        self._formats: Counter[str] = Counter()
        self._modes: Counter[str] = Counter()

    def begin(self, images: Iterable[str]) -> None:
        """Starts decoding what is not known."""
        self._checks.begin(image for image in images if image not in self._usable and image not in self._faults)

    def verdict(self, image: str) -> Verdict:
        """The verdict, waiting for it; without a checksum where the image was asked for before."""
        if image in self._usable:
            return Verdict(None, "", "")
        if image in self._faults:
            return self._faults[image]
        verdict = self._checks.verdict(image)
        is_new = self._seen.add(image)
        if verdict.kind is not None:
            self._faults[image] = verdict
            if len(self._faults) > _KNOWN_FAULTS:
                self._faults.popitem(last=False)
        else:
            self._usable.add(image)
        if is_new:
            self._note(image, verdict)
        return verdict

    def done(self, images: Iterable[str]) -> None:
        """Nobody asks for the verdicts of these for now."""
        self._checks.forget(images)

    def _note(self, image: str, verdict: Verdict) -> None:
        if verdict.info is not None:
            self._bytes += verdict.info.bytes
            self._formats[verdict.info.format] += 1
            self._modes[verdict.info.mode] += 1
        if self._folders is not None and verdict.kind not in ("bad_path", "outside_root") and SEPARATOR not in image:
            self._folders.add(posixpath.dirname(self._relative(image)))
            if len(self._folders) > _MOST_FOLDERS:
                self._folders = None

    def _relative(self, image: str) -> str:
        if os.path.isabs(image):
            return os.path.relpath(os.path.realpath(image), self._checks.root)
        return posixpath.normpath(image)

    def summary(self) -> ImageSummary:
        """What is known of all images, and which files no row names."""
        unused, examples = self._unused()
        return ImageSummary(
            checked=len(self._seen),
            broken=len(self._seen) - len(self._usable),
            bytes=self._bytes,
            formats=dict(self._formats.most_common()),
            modes=dict(self._modes.most_common()),
            unused=unused,
            unused_examples=tuple(examples),
        )

    def _unused(self) -> tuple[int | None, list[str]]:
        if self._folders is None:
            return None, []
        count = 0
        examples: list[str] = []
        for folder in sorted(self._folders):
            for name in _image_files(os.path.join(self._checks.root, folder)):
                path = posixpath.join(folder, name)
                spellings = (path, f"./{path}", os.path.join(self._checks.root, path))
                if any(spelling in self._seen for spelling in spellings):
                    continue
                count += 1
                if len(examples) < _EXAMPLES:
                    examples.append(path)
        return count, examples


def _image_files(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as listing:
            return sorted(
                item.name
                for item in listing
                if item.name.lower().endswith(_SUFFIXES) and not item.name.startswith(".") and item.is_file()
            )
    except OSError:  # the folder of images that are missing
        return []
