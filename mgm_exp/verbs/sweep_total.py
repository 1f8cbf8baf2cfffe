"""What all cells of a sweep take together: a stage that they share is counted once, as the store makes it once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mgm_exp.config import ExperimentConfig
    from mgm_exp.plan import CellPlan


@dataclass(frozen=True)
class Total:
    """Of the cells that were planned on one card.

    Args:
        device: Its name.
        runs: Cells, times ``sweep.seeds``; of a search its trials.
        gpu_hours: Stages that are shared once.
        alone: The same if nothing were shared.
        cost: In ``currency``; None: no price.
        is_search: The trials are as many as there may be, and none is stopped early.
    """

    device: str
    runs: int
    gpu_hours: float
    alone: float
    cost: float | None
    currency: str
    is_search: bool

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "gpu_hours": round(self.gpu_hours, 4), "alone": round(self.alone, 4)}

    def in_words(self) -> str:
        """A line for the reader."""
        runs = f"{'at most ' if self.is_search else ''}{self.runs:,} run{'s'[: self.runs != 1]}"
        saved = f" ({self.alone:,.2f} if nothing were shared)" if self.alone > 1.005 * self.gpu_hours else ""
        cost = "" if self.cost is None else f", {self.cost:,.2f} {self.currency}".rstrip()
        return f"total on {self.device}: {runs}, {self.gpu_hours:,.2f} GPU-hours{saved}{cost}"


def totals(cells: Sequence[tuple[ExperimentConfig, CellPlan]], *, trials: int | None) -> list[Total]:
    """One for each card; none where the hours of a cell are not known.

    Args:
        cells: Each configuration with its plan.
        trials: Of a search, whose fixed part is the only cell; None: a grid.
    """
    by_device: dict[str, list[tuple[ExperimentConfig, CellPlan]]] = {}
    for config, plan in cells:
        by_device.setdefault(plan.device, []).append((config, plan))
    return [_total(device, here, trials) for device, here in by_device.items() if _are_known(here)]


def _are_known(cells: Sequence[tuple[ExperimentConfig, CellPlan]]) -> bool:
    return all(plan.hours is not None for _, plan in cells)


def _total(device: str, cells: Sequence[tuple[ExperimentConfig, CellPlan]], trials: int | None) -> Total:
    hours: dict[str, float] = {}
    alone, runs = 0.0, 0
    for config, plan in cells:
        for number, one in enumerate(_repeated(config, trials)):
            runs += 1
            alone += plan.gpu_hours or 0.0
            for part, key in keys_of(one, plan, number if trials is not None else None).items():
                hours[key] = (plan.hours_of[part] or 0.0) * plan.devices
    used = sum(hours.values())
    prices = {(plan.price, plan.currency) for _, plan in cells}
    price, currency = prices.pop() if len(prices) == 1 else (None, "")
    cost = None if price is None else round(used * price, 2)
    return Total(device, runs, used, alone, cost, currency, trials is not None)


def _repeated(config: ExperimentConfig, trials: int | None) -> Iterator[ExperimentConfig]:
    for _ in range(trials or 1):
        for number in range(config.sweep.seeds):
            yield replace(config, seed=config.seed + number)


def keys_of(config: ExperimentConfig, plan: CellPlan, trial: int | None) -> Mapping[str, str]:
    """Stage or phase -> what makes it the same as that of another cell, by the payloads of the store's own keys.

    The model and the data stand in by their paths: nothing is read. ``trial``: of a search, whose points differ from
    the instruct stage on.
    """
    from mgm_exp import stages

    sources, demo = _sources(config), stages.key_of("demo", stages.demo_payload(config))
    captions = None
    if config.data.recaption and config.data.recaptioned_path is None:
        captions = stages.key_of("recaption", stages.recaption_payload(config, sources, demo))
    measure = stages.key_of("measure", stages.measure_payload(config, sources, demo, captions))
    curate = stages.key_of("curate", stages.curate_payload(config, sources, demo, captions, measure))
    align = stages.key_of("align", stages.align_payload(config, sources, curate))
    if not any(stage.name == "align" for stage in plan.stages):
        align = curate
    features = stages.key_of("features", stages.features_payload(config, sources, align, curate))
    instruct = stages.key_of("instruct", stages.instruct_payload(config, sources, align, curate))
    instruct += "" if trial is None else f" of trial {trial}"
    found = {"captioning": captions or "", "align": align, "features": features, "instruct": instruct}
    shared = {"evaluate[demo] baselines": f"baselines {align}"}
    parts = [part.name for part in (*plan.stages, *plan.phases)]
    return {part: found.get(part) or shared.get(part) or f"{part} {_asked(config)} {instruct}" for part in parts}


def _asked(config: ExperimentConfig) -> str:
    from mgm_exp.config import plain
    from mgm_exp.store import fingerprint

    return fingerprint([plain(config.eval), plain(config.train.validation)])


def _sources(config: ExperimentConfig) -> Any:
    from mgm_exp.config import plain
    from mgm_exp.stages import Sources
    from mgm_exp.store import fingerprint

    model, data = plain(config.model), config.data
    for key in ("gradient_checkpointing", "hidden_activation", "mining"):
        model.pop(key, None)
    return Sources(
        model=fingerprint(model),
        align=data.path,
        instruct=data.instruct.path or data.path,
        captioner=str(data.captioner.path),
        recaptioned=data.recaptioned_path,
        device=config.device.value,
        attention=config.model.attn_implementation.value,
        scorer=data.captioner.scorer.path,
    )
