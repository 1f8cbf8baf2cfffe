"""Features of a stage's images before its first step: what is in the store is taken up, what is not is made.

Frozen towers see the same in every epoch, stage and trial. What they saw is kept (``train.feature_cache``) with the
bits that the step would have computed: in groups of ``train.micro_batch_size`` images, filled up, in the precision of
training, on its device. Whether an image's place in the group changes its bits is looked at before anything is kept;
where it does, nothing is. All processes of a stage make a part each; the work is kept shard by shard.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mgm_exp.config import ExperimentConfig, FeatureTier, Precision, trains_towers
from mgm_exp.data.feature_cache import (
    BLANK,
    IMAGE_FEATURES,
    RESIZED_IMAGES,
    FeatureCache,
    ImageFeatures,
    image_sha256s,
    name_of,
    names_of_image,
    room_in,
    used_in,
)
from mgm_exp.data.images import ImageFault, decode_image, read_image_file
from mgm_exp.errors import DataError, Interrupted, UserError
from mgm_exp.model.eyes import bytes_of_image, eyes_of, resized_of
from mgm_exp.model.features import TIERS, TOKENS, depends_on_place, features_of
from mgm_exp.store import LeaseHeld, Store
from mgm_exp.train.engine import COMPUTE_DTYPE
from mgm_exp.train.job import StageSettings, TrainJob
from mgm_exp.train.ranks import Ranks

if TYPE_CHECKING:
    from mgm_exp.data import BatchPlan, ImageTextDataset

_THREADS = 4
_POLL_S = 0.5


def use_caches(
    dataset: ImageTextDataset,
    plan: BatchPlan,
    job: TrainJob,
    settings: StageSettings,
    model: Any,
    ranks: Ranks,
    say: Callable[[str], None],
    on_progress: Callable[[str, int, int], None] | None,
    is_stopped: Callable[[], bool],
) -> None:
    """Gives a dataset the features and resized images that the configuration asks for, made now where they are not yet.

    Called by all processes, with the model as it will train, on its device.

    Args:
        plan: Images that its steps do not read are not made. (A roll-back may lead beyond it: those are computed then.)

    Raises:
        Interrupted: a stop was requested; what was made is kept.
        UserError: ``train.feature_cache`` names a tier, and this machine's kernels give an image other bits in another
            place of a batch.
        DataError: an image cannot be read (any more).
    """
    config = job.experiment()
    if job.visual_tokens is not None:
        return
    wants_features = config.train.feature_cache is not FeatureTier.none
    if not wants_features and not config.train.resized_cache_gb:
        return
    work = _Pass(dataset, plan, job, config, settings, model, ranks, say, on_progress, is_stopped)
    if wants_features:
        dataset.features = work.features()
    if config.train.resized_cache_gb and not work.is_all_seen(dataset.features):
        dataset.resized = work.resized()


class _Pass:
    """The images of one stage on one of its processes. All of them take every turn together."""

    def __init__(
        self,
        dataset: ImageTextDataset,
        plan: BatchPlan,
        job: TrainJob,
        config: ExperimentConfig,
        settings: StageSettings,
        model: Any,
        ranks: Ranks,
        say: Callable[[str], None],
        on_progress: Callable[[str, int, int], None] | None,
        is_stopped: Callable[[], bool],
    ) -> None:
        self.dataset, self.config, self.settings, self.model = dataset, config, settings, model
        self.stage, self.ranks, self.is_stopped = job.stage, ranks, is_stopped
        self._say, self._on_progress = say, on_progress
        self.store = Store(Path(config.paths.store))
        self.pixel_settings: Any = dataset.processor.settings  # type: ignore[attr-defined]
        # Under ZeRO-3 all processes run the towers, or none: not one that a roll-back led to another image
        samples = range(plan.n_samples) if settings.zero_stage == 3 else plan.samples()
        self.images: list[str | None] = list(dict.fromkeys(dataset.records[sample].image for sample in samples))
        real = [image for image in self.images if image is not None]
        self.sha256s = image_sha256s(dataset.image_root, real, self.store.root / "fingerprints.json")
        self.names = {image: name_of(sha, dataset.aspect) for image, sha in self.sha256s.items()}
        # DeepSpeed computes in half precision throughout; plain PyTorch under autocast
        is_half = settings.precision is not Precision.fp32 and not settings.zero_stage
        self.half = COMPUTE_DTYPE[settings.precision] if is_half else None
        ranks.marks.works()

    def say(self, text: str) -> None:
        if self.ranks.is_first:
            self._say(f"{self.stage}: {text}")

    # -- features ----------------------------------------------------------------------------------------------

    def features(self) -> ImageFeatures | None:
        """Features of as many images as may be kept; None: no tier fits, or none can be taken up."""
        tier = self._tier()
        if tier is None:
            return None
        eyes = eyes_of(
            self.model,
            tier,
            self.pixel_settings,
            batch=self.settings.micro_batch_size,
            half=self.half,
        )
        cache = FeatureCache(self.store, IMAGE_FEATURES, eyes, budget_gb=self.config.train.feature_cache_gb)
        each = bytes_of_image(self.model, tier, self.pixel_settings, self.half)
        run = self._tower_run(tier)
        if not self._fill(cache, f"see images ({tier})", each, self._pixels, run, self._check_place(run)):
            return None
        found = ImageFeatures(cache, self.names)
        without = found.missing(self.images)
        # Under ZeRO-3 the towers' forward passes are joint ones: all processes run them, or none does
        most = max(row[0] for row in self.ranks.gather([float(without)]))
        if most and self.settings.zero_stage == 3:
            self.say(
                f"features of {int(most):,} of {len(self.images):,} images are not kept; zero=3 needs all of them or "
                "none, so that towers run in every step"
            )
            return None
        if without:
            self.say(
                f"features ({tier}) of {len(self.images) - without:,} of {len(self.images):,} images are kept; the "
                "others do not fit (train.feature_cache_gb, or the disk) and are computed in every step, with the "
                "same bits"
            )
        return found

    def _tier(self) -> str | None:
        """The tier that is asked for, or the one that saves most of those that may be kept and fit."""
        train = self.config.train
        trains_connector = self.stage != "instruct" or not train.freeze_connector
        if self.stage == "instruct" and trains_towers(train):
            self.say("train.feature_cache=auto keeps nothing here: a vision tower trains")
            return None
        if train.feature_cache is FeatureTier.tokens and trains_connector:
            self.say("train.feature_cache=tokens keeps nothing here: this stage trains the projector")
            return None
        if train.feature_cache is not FeatureTier.auto:
            return train.feature_cache.value
        allowed = [tier for tier in reversed(TIERS) if tier != TOKENS or not trains_connector]
        count = len(self.images) / 1e9
        sizes = {tier: count * bytes_of_image(self.model, tier, self.pixel_settings, self.half) for tier in allowed}
        room = room_in(self.store, IMAGE_FEATURES, train.feature_cache_gb) / 1e9
        chosen = next((tier for tier in allowed if sizes[tier] <= room), allowed[-1])
        there = self._first_complete(allowed)
        told = ", ".join(f"{tier} {size:.3g} GB" for tier, size in sizes.items())
        if there is not None:
            chosen, why = there, "which is in the store already"
        elif sizes[chosen] <= room:
            why = "the most that fits"
        else:
            why = "the smallest; no tier fits whole"
        # What the first process finds counts for all
        chosen = allowed[int(self.ranks.gather([float(allowed.index(chosen))])[0][0])]
        self.say(
            f"train.feature_cache=auto takes {chosen}, {why}: {len(self.images):,} images take {told} at most; there "
            f"is room for {room:.3g} GB"
        )
        return chosen

    def _first_complete(self, allowed: Sequence[str]) -> str | None:
        for tier in allowed:
            eyes = eyes_of(self.model, tier, self.pixel_settings, batch=self.settings.micro_batch_size, half=self.half)
            if not ImageFeatures(FeatureCache(self.store, IMAGE_FEATURES, eyes), self.names).missing(self.images):
                return tier
        return None

    def _tower_run(self, tier: str) -> Callable[[list[Any]], list[dict[str, Tensor]]]:
        device, size = self.ranks.device, self.settings.micro_batch_size

        def run(pixels: list[Any]) -> list[dict[str, Tensor]]:
            filled = [*pixels, *[pixels[-1]] * (size - len(pixels))]
            low, high = (torch.stack(side).to(device) for side in zip(*filled, strict=True))
            with torch.autocast(device.type, self.half, enabled=self.half is not None):
                return features_of(self.model.model, tier, low, high)[: len(pixels)]

        return run

    def _check_place(
        self, run: Callable[[list[Any]], list[dict[str, Tensor]]]
    ) -> Callable[[list[Any], list[dict[str, Tensor]]], bool]:
        """Whether features may be kept, judged by the first group and its features."""

        def is_independent(pixels: list[Any], made: list[dict[str, Tensor]]) -> bool:
            size = self.settings.micro_batch_size
            filled = [*pixels, *[pixels[-1]] * (size - len(pixels))]
            low, high = (torch.stack(side) for side in zip(*filled, strict=True))
            return not depends_on_place(low, high, lambda *sides: run(list(zip(*sides, strict=True))), made)

        return is_independent

    def is_all_seen(self, features: ImageFeatures | None) -> bool:
        """Whether no pixel is needed any more."""
        if features is None or features.missing(self.images):
            return False
        found = features.get(self.images[0])
        return found is not None and set(found) != {"low"}

    # -- resized images ----------------------------------------------------------------------------------------

    def resized(self) -> ImageFeatures:
        """Squares of as many images as may be kept."""
        cache = FeatureCache(
            self.store, RESIZED_IMAGES, resized_of(self.pixel_settings), budget_gb=self.config.train.resized_cache_gb
        )
        each = 3 * self.pixel_settings.image_size_aux**2

        def square(image: str) -> Any:
            opened = self._open(image)
            return {"square": torch.from_numpy(self.dataset.processor.square(opened, self.dataset.aspect))}, opened.size

        self._fill(cache, "decode images", each, square, lambda squares: squares, lambda *squares: True)
        found = ImageFeatures(cache, self.names)
        real = [image for image in self.images if image is not None]
        without = found.missing(real)
        if without:
            self.say(
                f"{len(real) - without:,} of {len(real):,} resized images are kept; the others do not fit "
                "(train.resized_cache_gb) and are decoded in every step"
            )
        return found

    # -- both --------------------------------------------------------------------------------------------------

    def _fill(
        self,
        cache: FeatureCache,
        what: str,
        each: int,
        read: Callable[[Any], Any],
        run: Callable[[list[Any]], list[dict[str, Tensor]]],
        may_keep: Callable[[list[Any], list[dict[str, Tensor]]], bool],
    ) -> bool:
        """Makes what is missing and fits, a part on each process; whether the cache may be used."""
        wanted = [image for image in self.images if image is not None or cache.stage == IMAGE_FEATURES]
        with self._alone(cache, what):
            cache.refresh()
            known = ImageFeatures(cache, self.names)
            # Files of one content are one entry
            missing = list({self._name(image): image for image in wanted if known.get(image) is None}.values())
            fits = int(min(row[0] for row in self.ranks.gather([float(cache.room() // max(each, 1))])))
            mine = missing[:fits][self.ranks.rank :: self.ranks.world_size]
            size = self.settings.micro_batch_size
            groups = [mine[start : start + size] for start in range(0, len(mine), size)]
            turns = int(max(row[0] for row in self.ranks.gather([float(len(groups))])))
            if not turns:
                return True
            began, is_usable = time.perf_counter(), True
            with _reading(groups, read) as pixels:
                for turn in range(turns):
                    if turn < len(groups):
                        group, found = groups[turn], next(pixels)
                        pixels_here = [one for one, _ in found]
                        made = run(pixels_here) if is_usable else []
                        is_usable = is_usable and (turn > 0 or may_keep(pixels_here, made))
                        if is_usable:
                            self._keep(cache, group, found, made)
                    self.ranks.marks.works()
                    stops, usable = zip(*self.ranks.gather([float(self.is_stopped()), float(is_usable)]), strict=True)
                    if not all(usable):
                        self._refuse()
                        return False
                    if self.ranks.is_first and self._on_progress is not None:
                        done = min(len(missing[:fits]), (turn + 1) * size * self.ranks.world_size)
                        self._on_progress(what, done, len(missing[:fits]))
                    if any(stops):
                        cache.flush()
                        raise Interrupted(
                            f"The {self.stage} stage was stopped before its first step; what was made of "
                            f"{len(missing[:fits]):,} images so far is kept.",
                            advice="The same command continues from there.",
                        )
            cache.flush()
            self.ranks.barrier()
            cache.refresh()
            seconds = time.perf_counter() - began
            count = len(missing[:fits])
            used = used_in(self.store, cache.stage) / 1e9
            self.say(f"{what}: {count:,} images in {seconds:.1f} s; {used:.3g} GB are kept in all")
        return True

    def _keep(
        self, cache: FeatureCache, group: list[str | None], found: list[Any], made: list[dict[str, Tensor]]
    ) -> None:
        for image, (_, shape), tensors in zip(group, found, made, strict=True):
            names = [BLANK] if image is None else names_of_image(self.sha256s[image], self.dataset.aspect, shape)
            cache.put(names, tensors)

    def _refuse(self) -> None:
        told = (
            "this machine's kernels give an image other bits in another place of a micro-batch, so that kept features "
            "would change the result"
        )
        if self.config.train.feature_cache is FeatureTier.auto:
            self.say(f"train.feature_cache=auto keeps nothing: {told}")
            return
        raise UserError(
            f"train.feature_cache={self.config.train.feature_cache.value}: {told}.",
            advice="Use train.feature_cache=none, or train.micro_batch_size=1, where there is one place.",
        )

    def _name(self, image: str | None) -> str:
        return BLANK if image is None else self.names[image]

    @contextmanager
    def _alone(self, cache: FeatureCache, what: str) -> Iterator[None]:
        """While it is open nobody else makes the same."""
        lease = cache.lease()
        held, said = False, False
        try:
            while True:
                if self.ranks.is_first and not held:
                    try:
                        lease.acquire(wait=False)
                        held = True
                    except LeaseHeld as error:
                        if not said:
                            self.say(f"{what}: waiting, {error.message}")
                            said = True
                begins, stops = zip(*self.ranks.gather([float(held), float(self.is_stopped())]), strict=True)
                if begins[0]:
                    break
                if any(stops):
                    raise Interrupted(
                        f"The {self.stage} stage was stopped before its first step.",
                        advice="Give the same command again.",
                    )
                self.ranks.marks.works()
                time.sleep(_POLL_S)
            yield
        finally:
            if held:
                lease.release()

    def _pixels(self, image: str | None) -> Any:
        """Both resolutions, and the size of the file's image."""
        processor = self.dataset.processor
        if image is None:
            return processor.no_pixels(), (1, 1)
        opened = self._open(image)
        return processor.pixels(opened, aspect=self.dataset.aspect), opened.size

    def _open(self, image: str) -> Any:
        root = self.dataset.image_root
        try:
            content = read_image_file(root, image)
            if "::" not in image and hashlib.sha256(content).hexdigest() != self.sha256s[image]:
                raise ImageFault("unreadable", "it was changed a moment ago")
            return decode_image(content, self.dataset.max_megapixels)
        except ImageFault as fault:
            raise DataError(
                f"The image {image} cannot be read any more ({fault}) below {root}; it could when the data was "
                "curated.",
                advice="Put the file back, or give the command again: changed data is curated anew.",
            ) from fault


@contextmanager
def _reading(groups: Sequence[Sequence[Any]], read: Callable[[Any], Any]) -> Iterator[Iterator[list[Any]]]:
    """What ``read`` gives for the images of each group, read by threads while the group before is worked on."""
    pool = ThreadPoolExecutor(_THREADS)

    def begin(number: int) -> list[Future[Any]]:
        return [pool.submit(read, image) for image in groups[number]] if number < len(groups) else []

    def results() -> Iterator[list[Any]]:
        waiting = begin(0)
        for number in range(len(groups)):
            following = begin(number + 1)
            yield [future.result() for future in waiting]
            waiting = following

    try:
        yield results()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
