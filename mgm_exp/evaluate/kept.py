"""What towers saw of a benchmark's images, kept in the store: trials that are asked the same questions share it.

``train.feature_cache`` says what is kept. Entries are those of training where arithmetic and batch size agree (fp32,
and half precision under ZeRO; groups of :data:`mgm_exp.evaluate.sight.GROUP` images). Answers are the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mgm_exp.config import ExperimentConfig, FeatureTier
from mgm_exp.data.feature_cache import IMAGE_FEATURES, FeatureCache, image_sha256s, name_of, room_in, size_of
from mgm_exp.evaluate.answerer import Answerer, MgmAnswerer, Pixels
from mgm_exp.store import Store

if TYPE_CHECKING:
    from torch import Tensor

    from mgm_exp.evaluate.benchmarks import Benchmark

Features = Mapping[str, "Tensor"]


class Keeper:
    """Finds or makes the features that a pass over a benchmark needs, as the configuration asks for.

    Args:
        config: Its ``train.feature_cache`` and store.
        say: Takes a sentence for the user; None: nobody listens.
    """

    def __init__(self, config: ExperimentConfig, say: Callable[[str], None] | None = None) -> None:
        self._config, self._say = config, say or (lambda text: None)

    def of(
        self, benchmark: Benchmark, answerers: Sequence[Answerer], images: Sequence[str], batch: int
    ) -> KeptSight | None:
        """Features of a pass; None where nothing is kept.

        Args:
            benchmark: Whose images.
            answerers: The models.
            images: All of the pass.
            batch: Images that go through the towers together.
        """
        train = self._config.train
        models = [answerer for answerer in answerers if isinstance(answerer, MgmAnswerer)]
        if train.feature_cache is FeatureTier.none or len(models) < len(answerers) or not images:
            return None
        store = Store(Path(self._config.paths.store))
        tier = self._tier(store, models[0], len(set(images)))
        corruption = benchmark.settings.corruption
        # What is done to an image is drawn by its name
        mark = "" if corruption is None else f":{corruption} v{corruption.version} "
        sha256s = image_sha256s(benchmark.image_root, images, store.root / "fingerprints.json")
        names = {image: name_of(sha256, "pad") + (mark and mark + image) for image, sha256 in sha256s.items()}
        by_eyes = {model.eyes: model for model in models}
        caches: dict[str, FeatureCache] = {}
        kept: dict[str, FeatureCache] = {}
        for eyes, model in by_eyes.items():
            cache = FeatureCache(store, IMAGE_FEATURES, model.eyes_of(tier, batch), budget_gb=train.feature_cache_gb)
            kept[eyes] = caches.setdefault(cache.key, cache)
        return KeptSight(tier, kept, by_eyes, names, batch, self._say)

    def _tier(self, store: Store, model: MgmAnswerer, count: int) -> str:
        train = self._config.train
        if train.feature_cache is not FeatureTier.auto:
            return train.feature_cache.value
        if train.freeze_connector:
            return FeatureTier.tokens.value
        fits = count * model.bytes_of("towers") <= room_in(store, IMAGE_FEATURES, train.feature_cache_gb)
        return "towers" if fits else "clip"


class KeptSight:
    """The features of one pass.

    Args:
        tier: What is kept.
        by_eyes: Where, for each pair of eyes; towers that are shared share it.
        models: For each pair of eyes.
        names: Image -> its name in the cache.
        batch: Images in one pass through the towers.
        say: Takes a sentence for the user.
    """

    def __init__(
        self,
        tier: str,
        by_eyes: Mapping[str, FeatureCache],
        models: Mapping[str, MgmAnswerer],
        names: Mapping[str, str],
        batch: int,
        say: Callable[[str], None],
    ) -> None:
        self.tier, self.batch, self._by_eyes, self._models, self._names = tier, batch, by_eyes, models, names
        self._say, self._room, self._is_checked = say, min(cache.room() for cache in by_eyes.values()), False

    def needs_pixels(self, image: str) -> bool:
        """Whether the image has to be decoded."""
        name = self._names[image]
        return self.tier == "clip" or any(name not in cache for cache in self._by_eyes.values())

    def see(self, images: Sequence[str], pixels: Callable[[str], Pixels]) -> list[tuple[Tensor, ...]]:
        """The tokens of at most ``batch`` images, for each pair of eyes."""
        found: dict[str, list[Features]] = {}
        seen: list[list[Tensor]] = []
        for eyes, cache in self._by_eyes.items():
            model = self._models[eyes]
            if cache.key not in found:
                found[cache.key] = self._features(model, cache, images, pixels)
            features = self._filled(found[cache.key])
            detail = [pixels(image)[1] for image in images] if self.tier == "clip" else []
            seen.append(model.see_features(features, self._filled(detail))[: len(images)])
        return list(zip(*seen, strict=True))

    def close(self) -> None:
        """Publishes what was made."""
        for cache in self._by_eyes.values():
            cache.flush()

    def _features(
        self, model: MgmAnswerer, cache: FeatureCache, images: Sequence[str], pixels: Callable[[str], Pixels]
    ) -> list[Features]:
        there: dict[str, Features] = {}
        missing = []
        for image in images:
            kept = cache.get(self._names[image])
            if kept is None:
                missing.append(image)
            else:
                there[image] = kept
        if missing:
            group = self._filled([pixels(image) for image in missing])
            made = model.features(self.tier, group)[: len(missing)]
            may_keep = self._may_keep(model, group, made)
            for image, tensors in zip(missing, made, strict=True):
                there[image] = tensors
                if may_keep and size_of(tensors) <= self._room:
                    self._room -= size_of(tensors)
                    cache.put([self._names[image]], tensors)
        return [there[image] for image in images]

    def _may_keep(self, model: MgmAnswerer, group: Sequence[Pixels], made: Sequence[Features]) -> bool:
        """Not where an image's place in a group changes its bits."""
        if not self._is_checked:
            self._is_checked = True
            if model.depends_on_place(self.tier, group, made):
                self._room = 0
                self._say(
                    "evaluation keeps no features (train.feature_cache): this machine's kernels give an image other "
                    "bits in another place of a group"
                )
        return self._room > 0

    def _filled(self, items: Sequence[Any]) -> list[Any]:
        return [*items, *[items[-1]] * (self.batch - len(items))] if items else []
