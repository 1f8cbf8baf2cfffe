"""What is kept between compositions changes none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from mgm_exp.compose import compose_tree, session
from mgm_exp.config import ExperimentConfig, plain
from mgm_exp.config.experiment import from_plain, typed

CHOICES: list[list[str]] = [
    ["adapter.rank=3", "debug=fast"],
    ["debug=fast", "hydra.run.dir=elsewhere"],
    ["adapter=full", "zero=2", "seed=7"],
]


def as_composed(hydra: Any, overrides: list[str], *, is_sweep: bool = False) -> dict[str, Any]:
    tree = compose_tree(hydra, overrides, is_sweep=is_sweep)
    return OmegaConf.to_container(tree, resolve=False)  # type: ignore[return-value]


def test_each_composition_is_what_hydra_makes_of_it_alone() -> None:
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    with session() as hydra:
        remembered = [as_composed(hydra, choice, is_sweep=True) for choice in [*CHOICES, *CHOICES]]
        hydra.config_loader = ConfigLoaderImpl(hydra.config_loader.get_search_path())
        alone = [as_composed(hydra, choice, is_sweep=True) for choice in CHOICES]
    assert remembered == alone * 2


def test_a_tree_that_is_changed_changes_no_other() -> None:
    with session() as hydra:
        before = as_composed(hydra, ["debug=fast"])
        tree = compose_tree(hydra, ["debug=fast"])
        tree.train.lr = 7.0
        tree.hydra.run.dir = "elsewhere"
        assert as_composed(hydra, ["debug=fast"]) == before


def test_a_folder_of_ones_own_wins_and_another_session_reads_it_anew(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for lr in (0.25, 0.5):
        (tmp_path / "train" / "mine.yaml").write_text(f"defaults: [demo, _self_]\nname: mine\nlr: {lr}\n")
        with session(str(tmp_path)) as hydra:
            assert typed(compose_tree(hydra, ["train=mine"])).train.lr == lr


def test_a_typed_tree_needs_no_second_merge_and_a_changed_one_is_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    with session() as hydra:
        tree = compose_tree(hydra, ["debug=fast", "adapter.rank=3"])
        quick = typed(tree)
        assert quick == typed(OmegaConf.create(plain(quick)))
        less = compose_tree(hydra, ["debug=fast", "adapter.rank=3", "~seed"])
        assert typed(less) == quick, "what is removed has its default again"
        monkeypatch.setattr(OmegaConf, "merge", None)
        assert typed(tree) == quick


def test_a_configuration_that_is_read_back_belongs_to_who_asked(compose: Any) -> None:
    values = plain(compose("debug=fast"))
    first = from_plain(values)
    first.train.lr = 7.0
    assert from_plain(values).train.lr != 7.0
    values["train"]["lr"] = 0.125
    assert isinstance(from_plain(values), ExperimentConfig) and from_plain(values).train.lr == 0.125
