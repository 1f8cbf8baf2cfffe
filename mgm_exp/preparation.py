"""From files to records: demo -> check -> recaption -> measure -> curate, each a stage of the store.

    prepared = Preparation(config, found, produce, tell, say).run()

Images are checked once for all arms; captions are shared by runs that differ in anything else; the operators' values
are shared by recipes that differ in limits. ``python -m mgm_exp`` goes through here before it trains, and
``mgm-exp curate`` does nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from mgm_exp import stages
from mgm_exp.config import CaptionEngine, CaptionPolicy, ExperimentConfig, ModelFamily
from mgm_exp.data.recipe import operators_of
from mgm_exp.preflight import Preflight
from mgm_exp.store import StageOutput


class Produce(Protocol):
    """Takes a stage from the store, or makes it."""

    def __call__(
        self, stage: str, payload: stages.Payload, make: Callable[[Path], dict[str, Any]], /
    ) -> StageOutput: ...


@dataclass(frozen=True)
class Prepared:
    """What training and evaluation read.

    Args:
        curated: Records of both stages, fates, report and page.
        demo: Folder of the generated demo data; None where the user's own data serves both stages.
        captions: The new captions; None where nothing was recaptioned.
        values: The values of the recipe's operators, and the pairs that they belong to; None where no operator is on.
        origins: For ``align`` and ``instruct``, where rows and images come from.
    """

    curated: StageOutput
    demo: Path | None
    captions: StageOutput | None
    values: StageOutput | None
    origins: dict[str, Any]


class Preparation:
    """The stages before training.

    Args:
        config: The checked configuration.
        found: What the preflight found out about the files.
        produce: How a stage is made, shared and recorded.
        tell: Told (what, done, total) while a stage works.
        say: Takes a sentence for the user.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        found: Preflight,
        produce: Produce,
        tell: Callable[[str, int, int], None],
        say: Callable[[str], None],
    ) -> None:
        self.config, self.found = config, found
        self.produce, self.tell, self.say = produce, tell, say

    def run(self) -> Prepared:
        """Makes what is not there yet."""
        from mgm_exp.data import stages as data

        config, sources, tell = self.config, self.found.sources, self.tell
        demo: StageOutput | None = None
        captions: StageOutput | None = None
        values: StageOutput | None = None
        if self.found.needs_demo:
            payload = stages.demo_payload(config)
            demo = self.produce("demo", payload, lambda work: data.make_demo(config, work, tell))
        demo_key, demo_path = _key(demo), _path(demo)
        payload = stages.check_payload(config, sources, demo_key)
        checked = self.produce("check", payload, lambda work: data.make_checked(config, work, demo_path, tell))
        if config.data.recaption and config.data.recaptioned_path is None:
            captions = self._recaption(demo_key, demo_path)
        new_captions = _path(captions)
        if operators_of(config.data.recipe):
            values = self.produce(
                "measure",
                stages.measure_payload(config, sources, demo_key, _key(captions)),
                lambda work: data.make_values(config, work, demo_path, new_captions, checked.path, tell),
            )
        curated = self.produce(
            "curate",
            stages.curate_payload(config, sources, demo_key, _key(captions), _key(values)),
            lambda work: data.make_curated(
                config,
                self._processors(),
                work,
                demo_path,
                new_captions,
                checked.path,
                _path(values),
                captions.meta if captions else None,
                tell,
            ),
        )
        is_one_stage = config.model.family is ModelFamily.hf
        for sentence in data.in_words(curated.meta, ("instruct",) if is_one_stage else ("align", "instruct")):
            self.say(sentence)
        return Prepared(curated, demo_path, captions, values, data.origins(config, demo_path, new_captions))

    def _recaption(self, demo_key: str | None, demo_path: Path | None) -> StageOutput:
        from mgm_exp.data import stages as data

        def make(work: Path) -> dict[str, Any]:
            return data.make_captions(self.config, self._captioner(), self._scorer(), work, demo_path, self.tell)

        payload = stages.recaption_payload(self.config, self.found.sources, demo_key)
        captions = self.produce("recaption", payload, make)
        for sentence in data.captions_in_words(captions.meta):
            self.say(sentence)
        return captions

    def _captioner(self) -> Any:
        """An MGM run or checkpoint, or what the folder holds otherwise."""
        section, device = self.config.data.captioner, self.found.sources.device
        if section.path is not None and section.engine is CaptionEngine.mgm_exp:
            from mgm_exp.evaluate.captioner import MgmCaptioner, is_mgm

            folder = Path(section.path).expanduser()
            if is_mgm(folder):
                from mgm_exp.data.captioner import CaptionSettings

                return MgmCaptioner(folder, device, CaptionSettings.of_section(section))
        from mgm_exp.data.captioner import open_captioner

        return open_captioner(section, device=device, cache=Path(self.config.paths.store))

    def _scorer(self) -> Any:
        captioner = self.config.data.captioner
        if captioner.policy is not CaptionPolicy.keep_if_better:
            return None
        from mgm_exp.data.scoring import open_scorer

        return open_scorer(Path(str(captioner.scorer.path)).expanduser(), device=self.found.sources.device)

    def _processors(self) -> dict[str, Any]:
        """The model's processor with the longest sequence of each stage."""
        from mgm_exp import model

        train = self.config.train
        family = model.family_of(self.config.model)
        if self.config.model.family is ModelFamily.hf:
            return dict.fromkeys(("align", "instruct"), family.processor(self.config.model, train.max_length))
        lengths = {"align": train.align.max_length, "instruct": train.max_length}
        return {stage: family.processor(self.config.model, length, stage) for stage, length in lengths.items()}


def _key(output: StageOutput | None) -> str | None:
    return output.key if output else None


def _path(output: StageOutput | None) -> Path | None:
    return output.path if output else None
