"""The sweeper ``mgm_optuna``: a search with Optuna that continues, prunes, and loses nothing to a kill.

    python -m mgm_exp -m hydra/sweeper=mgm_optuna 'adapter.rank=choice(4,8,16)' 'train.lr=tag(log,interval(1e-3,2e-2))'

Here the command line becomes a search space, a study and a folder; :mod:`mgm_exp.campaign` does the work.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hydra_plugins.mgm_exp_plugins.composing import ComposingSweeper

if TYPE_CHECKING:
    from pathlib import Path

    from omegaconf import DictConfig

    from mgm_exp.config import Direction
    from mgm_exp.search import Space

SETTINGS = "settings"


class MgmOptunaSweeper(ComposingSweeper):
    """See the module.

    Args:
        params: What a sweep file searches: key -> values as on the command line, or ``{space, value, when}``.
    """

    def sweep(self, arguments: list[str]) -> dict[str, Any]:
        """Works on the search until it is over.

        Args:
            arguments: The overrides of the command line, Hydra's own left out.

        Returns:
            The content of ``sweep.json``.

        Raises:
            ConfigError: the search, or its first trial, cannot be composed.
            UserError: the study is another one's, or a trial met what every other one would meet, too.
            Interrupted: a signal; the same command continues.
        """
        from mgm_exp.alerts import tell_sweep
        from mgm_exp.campaign import Campaign
        from mgm_exp.config import PrunerName
        from mgm_exp.search import make_pruner, make_sampler, open_storage, open_study, storage_place
        from mgm_exp.search.reports import study_name
        from mgm_exp.study_books import StudyBooks
        from mgm_exp.sweep_folder import make_folder

        assert self.config is not None
        space = self._space(arguments)
        base = self.config_of(space.fixed)
        sweep = base.sweep
        objectives = sweep.objectives or [sweep.objective or f"{base.eval.benchmarks[0]}/accuracy"]
        directions = sweep.directions or [sweep.direction]
        pauses = sweep.pruner.name is PrunerName.rungs
        sampler = make_sampler(sweep.sampler, space, with_constraints=True, with_pauses=pauses)
        for number, point in enumerate(sweep.enqueue):
            space.fixed_point(point, f"sweep.enqueue[{number}]")
        settings = self._settings(space, objectives, directions, sweep.seeds)
        folder, name = make_folder(self.config, lambda tree: self._name(space, settings, arguments))
        self._refuse_other_sweep(folder)
        self.write_into(folder)
        from mgm_exp.store import Lease

        with Lease(folder / ".desk"):  # two sweepers that begin at once make one database
            study = open_study(
                open_storage(storage_place(sweep.storage, folder)),
                study_name(folder),
                directions,
                sampler,
                make_pruner(sweep.pruner, base.train.validation.every_steps),
            )
            _refuse_other_study(study, settings, name)
        books = StudyBooks(folder, name, objectives, directions, study)
        books.command = list(arguments)
        slots = self.make_slots(base)
        campaign = Campaign(study, space, books, base, slots, self._config_value, self.config_of, _say)
        try:
            content = campaign.run()
        finally:
            slots.close()
            self._show(folder, study, books)
        tell_sweep(base.alerts, folder, content)
        return content

    # -- the search space and what its points compose to -------------------------------------------------------

    def _space(self, arguments: Sequence[str]) -> Space:
        from omegaconf import DictConfig, ListConfig, OmegaConf

        from mgm_exp.compose import parse
        from mgm_exp.errors import ConfigError
        from mgm_exp.grid import NOT_SWEPT
        from mgm_exp.search import parse_space

        assert self.hydra_context is not None
        loader = self.hydra_context.config_loader
        params = {
            str(key): OmegaConf.to_container(value) if isinstance(value, (DictConfig, ListConfig)) else value
            for key, value in self.params.items()
        }
        space = parse_space(arguments, params, lambda overrides: parse(overrides, loader))
        if not space.dimensions:
            raise ConfigError(
                "Nothing is searched: no argument has several values or an interval.",
                advice="Give adapter.rank=choice(4,8,16) or train.lr='tag(log,interval(1e-4,1e-2))', or a ready-made "
                "search such as +sweeps=lora_search.",
            )
        for key in space.keys:
            if NOT_SWEPT.fullmatch(key.lstrip("+")):
                raise ConfigError(f"{key} says where or how the sweep runs and has one value.")
        return space

    def _config_value(self, name: str, overrides: Sequence[str]) -> Any:
        """What a formula's name stands for: a key's value, or the choice of a group."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        from mgm_exp.compose import explained
        from mgm_exp.spelling import unknown_key

        tree = self.tree_of(overrides)
        if name in tree.hydra.runtime.choices:
            return tree.hydra.runtime.choices[name]
        try:
            value = OmegaConf.select(tree, name, throw_on_missing=False)
            is_there = value is not None or OmegaConf.is_missing(tree, name) or _has(tree, name)
        except OmegaConfBaseException as error:
            raise explained(error, overrides) from error
        if not is_there:
            raise unknown_key(name, f"the name {name} in a formula")
        return value.value if isinstance(value, enum.Enum) else value

    # -- where and how -----------------------------------------------------------------------------------------

    def _settings(
        self, space: Space, objectives: Sequence[str], directions: Sequence[Direction], seeds: int
    ) -> dict[str, Any]:
        """What must stay the same for a study to be continued."""
        from mgm_exp.grid import without
        from mgm_exp.store import fingerprint

        rest = without(self.tree_of(space.fixed), space.keys)
        return {
            "config": fingerprint({"config": rest})[:16],
            "objectives": list(objectives),
            "directions": [direction.value for direction in directions],
            "seeds": seeds,
        }

    def _name(self, space: Space, settings: dict[str, Any], arguments: Sequence[str]) -> str:
        """The default name: the ready-made sweep's or what is searched, and a hash of the rest."""
        from mgm_exp.grid import plain_name
        from mgm_exp.store import fingerprint

        preset = next((item.partition("=")[2] for item in arguments if item.startswith("+sweeps=")), "")
        items = [
            f"{item.key} {getattr(item, 'domain', getattr(item, 'formula', ''))} {item.when}" for item in space.items
        ]
        swept = preset or "+".join(plain_name(key) for key in space.keys)[:100].rstrip(".+=,-")
        return f"{plain_name(swept) if preset else swept}-{fingerprint({**settings, 'space': sorted(items)})[:8]}"

    def _refuse_other_sweep(self, folder: Path) -> None:
        from mgm_exp.errors import UserError
        from mgm_exp.folders import read_record

        record = read_record(folder / "sweep.json")
        if record and record.get("sweeper") != "mgm_optuna":
            raise UserError(f"{folder} holds a grid, not a search.", advice="Give sweep.name=ANOTHER.")

    def _show(self, folder: Path, study: Any, books: Any) -> None:
        """The table of the trials, their comparison and the charts as files."""
        from mgm_exp.compare import compare, write_comparison, write_markdown
        from mgm_exp.search import draw_study
        from mgm_exp.study_table import print_search

        if not books.to_json()["trials"]:
            return
        print()
        print_search(folder)
        found = compare([folder])
        write_comparison(found, folder / "comparison.json")
        write_markdown(found, folder / "table.md")
        drawn = draw_study(study, folder, books.objectives, books.directions)
        print(
            f"Runs lie in {folder}; charts: {', '.join(path.name for path in drawn)}"
            if drawn
            else f"Runs lie in {folder}"
        )


def _refuse_other_study(study: Any, settings: dict[str, Any], name: str) -> None:
    """A study whose trials ran with another configuration cannot be continued with this one."""
    from mgm_exp.errors import UserError

    before = study.user_attrs.get(SETTINGS)
    if before is None:
        study.set_user_attr(SETTINGS, settings)
    elif before != settings:
        words = {"config": "what is not searched"}
        changed = [words.get(key, f"sweep.{key}") for key in settings if before.get(key) != settings[key]]
        raise UserError(
            f"The search {name} was begun with other settings ({', '.join(changed)}), so its trials cannot be compared "
            "with new ones.",
            advice="Give the settings it was begun with, or sweep.name=ANOTHER.",
        )


def _has(tree: DictConfig, name: str) -> bool:
    from omegaconf import OmegaConf

    parent, _, last = name.rpartition(".")
    section = OmegaConf.select(tree, parent) if parent else tree
    return section is not None and last in section


def _say(text: str) -> None:
    print(text, flush=True)
