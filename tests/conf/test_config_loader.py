"""What is kept between compositions changes none of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mgm_exp.compose import compose_tree, session
from mgm_exp.config import ExperimentConfig, plain
from mgm_exp.config.as_json import NotPlain, restored
from mgm_exp.config.experiment import from_plain, typed
from mgm_exp.errors import ConfigError

CHOICES: list[list[str]] = [
    ["adapter.rank=3", "debug=fast"],
    ["debug=fast", "hydra.run.dir=elsewhere"],
    ["adapter=full", "zero=2", "seed=7"],
    ["adapter=full", "zero=2", "seed=8", "train.lr=0.5"],
    ["+sweeps=lora_search", "adapter=full"],
    ["~zero", "seed=7"],
    ["adapter=full"],
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


def test_files_are_chosen_once_for_all_cells_that_differ_in_values(monkeypatch: pytest.MonkeyPatch) -> None:
    from mgm_exp import config_loader

    worked_out: list[list[str]] = []
    hydras = config_loader.create_defaults_list

    def watched(repo: Any, name: Any, overrides: list[Any], *others: Any) -> Any:
        worked_out.append([override.input_line for override in overrides])
        return hydras(repo, name, overrides, *others)

    monkeypatch.setattr(config_loader, "create_defaults_list", watched)
    with session() as hydra:
        for lr in (0.1, 0.2, 0.3):
            assert compose_tree(hydra, ["adapter=lora_r8", f"train.lr={lr}"]).train.lr == lr
            tree = compose_tree(hydra, [f"train.lr={lr}", "adapter=full"])
            assert (tree.train.lr, tree.adapter.name, tree.hydra.runtime.choices.adapter) == (lr, "full", "full")
    assert worked_out == [["adapter=lora_r8", "train.lr=0.1"], ["train.lr=0.1", "adapter=full"]]


@pytest.mark.parametrize("wrong", ["adapter=none_such", "~data=none_such", "+zero=2", "nothing=1", "adapter=3"])
def test_what_does_not_compose_is_refused_after_what_does(wrong: str) -> None:
    with session() as hydra:
        for _ in range(2):
            compose_tree(hydra, ["adapter=full"])
            with pytest.raises(ConfigError):
                compose_tree(hydra, ["adapter=full", wrong] if not wrong.startswith("adapter") else [wrong])


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
    first.train.lr, first.eval.benchmarks[0] = 7.0, "other"
    assert from_plain(values) == compose("debug=fast")
    values["train"]["lr"] = 0.125
    assert from_plain(values).train.lr == 0.125


@pytest.mark.parametrize("choice", ["debug=fast", "model=mgm_2b", "+sweeps=lora_search", "+sweeps=recipe"])
def test_what_is_restored_is_what_omegaconf_makes_of_it(choice: str, compose_tree: Any) -> None:
    config = typed(compose_tree(choice, is_sweep=True))
    assert restored(ExperimentConfig, plain(config)) == typed(OmegaConf.create(plain(config))) == config


@pytest.mark.parametrize(
    ("key", "value", "meant"),
    [("lr", 1, 1.0), ("lr", "1e-3", 1e-3), ("precision", "FP32", None), ("max_steps", "${seed}", 0)],
)
def test_what_was_edited_by_hand_is_read_as_omegaconf_reads_it(compose: Any, key: str, value: Any, meant: Any) -> None:
    values = json.loads(json.dumps(plain(compose("debug=fast"))))
    values["train"][key] = value
    with pytest.raises(NotPlain):
        restored(ExperimentConfig, values)
    if key == "lr":
        read = from_plain(values).train.lr
        assert read == meant and isinstance(read, float)
    else:
        with pytest.raises((ConfigError, OmegaConfBaseException)):
            from_plain(values)


def test_a_key_that_is_not_there_is_named(compose: Any) -> None:
    values = plain(compose("debug=fast"))
    values["train"]["lrr"] = 1.0
    with pytest.raises((ConfigError, OmegaConfBaseException), match="lrr"):
        from_plain(values)


def test_an_override_that_was_parsed_before_belongs_to_who_asks() -> None:
    from mgm_exp.compose import parse

    first, again = parse(["train={lr: 1, names: [a]}"]), parse(["train={lr: 1, names: [a]}"])
    assert first[0].value() == again[0].value()
    first[0].value()["names"].append("b")
    first[0].package = "elsewhere"
    (third,) = parse(["train={lr: 1, names: [a]}"])
    assert third.value() == {"lr": 1, "names": ["a"]} and third.package is None
    for _ in range(2):
        with pytest.raises(ConfigError):
            parse(["train.lr=[1"])
