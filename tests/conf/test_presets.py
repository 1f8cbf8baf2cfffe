"""Every file of conf/ and sweeps/ composes, is typed and checked, and leaves no key without a value."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from mgm_exp.bootstrap import CONF, SWEEPS
from mgm_exp.compose import checked, parse
from mgm_exp.config import AdapterKind, BadRows, ExperimentConfig, Precision, TrackerMode, from_plain, plain
from mgm_exp.errors import ConfigError
from mgm_exp.grid import parse_grid
from mgm_exp.search import parse_space

Compose = Callable[..., ExperimentConfig]

CHOICES = sorted(
    f"{folder.name}={file.stem}"
    for folder in CONF.iterdir()
    if folder.is_dir() and folder.name != "hydra"
    for file in folder.glob("*.yaml")
)
SWEEP_NAMES = sorted(file.stem for file in SWEEPS.glob("*.yaml"))
SEARCH_NAMES = [name for name in SWEEP_NAMES if "mgm_optuna" in (SWEEPS / f"{name}.yaml").read_text(encoding="utf-8")]
FILES = sorted([*CONF.rglob("*.yaml"), *SWEEPS.glob("*.yaml")])


def missing_keys(tree: Any) -> list[str]:
    return [line.strip() for line in OmegaConf.to_yaml(tree, resolve=True).splitlines() if line.endswith("???")]


@pytest.mark.parametrize("choice", ["", *CHOICES])
def test_every_choice_of_every_group_composes_and_is_complete(choice: str, compose_tree: Callable[..., Any]) -> None:
    tree = compose_tree(*([choice] if choice else []))
    config = checked(tree)
    OmegaConf.set_struct(tree, False)
    tree.pop("hydra")
    assert missing_keys(tree) == []
    assert from_plain(plain(config)) == config


@pytest.mark.parametrize(
    ("model", "adapter", "zero"),
    [("tiny", "full", "2"), ("tiny", "lora_r16", "3"), ("mgm_2b", "full", "3"), ("mgm_2b", "lora_r8", "2")],
)
def test_the_main_groups_go_together(compose: Compose, model: str, adapter: str, zero: str) -> None:
    config = compose(f"model={model}", f"adapter={adapter}", f"zero={zero}")
    assert config.zero.stage == int(zero)
    assert config.name == f"{model}-raw-{adapter}-zero{zero}"


@pytest.mark.parametrize("name", sorted({*SWEEP_NAMES} - {*SEARCH_NAMES}))
def test_every_cell_of_every_ready_made_sweep_composes(
    name: str, compose_tree: Callable[..., Any], compose: Compose
) -> None:
    tree = compose_tree(f"+sweeps={name}", is_sweep=True)
    assert tree.hydra.mode.name == "MULTIRUN"
    assert "optuna" not in tree.hydra.sweeper._target_
    cells = list(parse_grid([f"+sweeps={name}"], tree.hydra.sweeper.params).cells())
    assert cells
    for cell in cells:
        compose(*cell.overrides)


@pytest.mark.parametrize("name", SEARCH_NAMES)
def test_every_ready_made_search_has_points_that_compose(
    name: str, compose_tree: Callable[..., Any], compose: Compose
) -> None:
    tree = compose_tree(f"+sweeps={name}", is_sweep=True)
    assert "optuna" in tree.hydra.sweeper._target_
    import optuna

    space = parse_space([f"+sweeps={name}"], OmegaConf.to_container(tree.hydra.sweeper.params), parse)  # type: ignore[arg-type]
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    enqueued = [dict(point) for point in tree.sweep.enqueue]
    for point in enqueued:
        study.enqueue_trial(space.fixed_point(point, "sweep.enqueue"))
    for number in range(len(enqueued) + 5):
        found = space.choose(
            study.ask(), lambda key, overrides: OmegaConf.select(compose_tree(*overrides, is_sweep=True), key)
        )
        config = compose(*found.overrides, "hydra.mode=RUN")
        if number == 0 and enqueued:
            default = compose(f"data={config.data.name}")
            assert config.data == default.data, "the first is the default"
            assert (config.adapter, config.train.lr) == (default.adapter, default.train.lr)


def test_the_ablation_is_data_times_adapter(compose_tree: Callable[..., Any]) -> None:
    params = compose_tree("+sweeps=ablation", is_sweep=True).hydra.sweeper.params
    cells = [tuple(cell.params.values()) for cell in parse_grid([], params).cells()]
    assert cells == [(data, adapter) for data in ("raw", "blip2") for adapter in ("full", "lora_r8", "lora_r16")]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONF.parent)))
def test_every_file_says_what_it_is(file: Path) -> None:
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("# @")]
    assert lines[0].startswith("# "), "the first line is shown by --help"
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", SWEEP_NAMES)
def test_every_sweep_says_what_it_asks_costs_and_how_to_run_it(name: str) -> None:
    header = (SWEEPS / f"{name}.yaml").read_text(encoding="utf-8")
    for word in ("# Asks:", "# Cost:", "# Run:", f"+sweeps={name}"):
        assert word in header


def test_presets_hold_no_key_twice() -> None:
    """A YAML mapping with a key given twice silently keeps the last one."""
    for file in FILES:
        yaml.load(file.read_text(encoding="utf-8"), Loader=_Strict)  # noqa: S506 - a SafeLoader that is stricter


class _Strict(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{node.start_mark}: a key is given twice in {keys}"
        return super().construct_mapping(node, deep)


def test_mgm_2b_brings_the_official_recipe_and_benchmark(compose: Compose) -> None:
    config = compose("model=mgm_2b")
    assert (config.train.name, config.eval.benchmarks) == ("official", ["textvqa"])
    assert config.model.gradient_checkpointing
    assert config.model.hidden_activation == "gelu_pytorch_tanh"
    assert not config.train.freeze_connector
    assert not config.train.cache_visual_tokens


@pytest.mark.parametrize("name", ["mgm_7b", "mgm_8b", "mgm_13b"])
def test_the_larger_models_bring_the_same_recipe_and_obey_their_folder(compose: Compose, name: str) -> None:
    config = compose(f"model={name}")
    assert (config.model.name, config.train.name, config.eval.benchmarks) == (name, "official", ["textvqa"])
    assert config.model.hidden_activation is None and config.model.image_grid is None
    assert (config.train.global_batch_size, config.train.align.global_batch_size) == (128, 256)


def test_hd_is_the_official_one_and_keeps_the_connector_of_stage_1(compose: Compose) -> None:
    config = compose("model=mgm_2b_hd")
    assert (config.model.image_grid, config.model.image_global, config.model.image_size_aux) == (2, True, 1536)
    assert (config.train.max_length, config.train.align.max_steps) == (4096, 0)
    assert compose("model=mgm_2b_hd", "train=demo").train.max_length == 4096, "2,880 visual tokens need it"


@pytest.mark.parametrize(
    "order", [("model=mgm_2b", "train=demo", "eval=demo"), ("eval=demo", "train=demo", "model=mgm_2b")]
)
def test_the_command_line_wins_over_what_a_model_brings(compose: Compose, order: tuple[str, ...]) -> None:
    config = compose(*order)
    assert (config.train.name, config.eval.name, config.model.name) == ("demo", "demo", "mgm_2b")


def test_the_official_recipe_is_the_published_one(compose: Compose) -> None:
    config = compose("model=mgm_2b", "adapter=full")
    train, align = config.train, config.train.align
    assert (align.lr, align.global_batch_size, align.warmup_ratio, align.epochs) == (1e-3, 256, 0.03, 1.0)
    assert (train.lr, train.projector_lr, train.global_batch_size, train.warmup_ratio) == (2e-5, 2e-5, 128, 0.03)
    assert (train.weight_decay, train.max_length, train.precision) == (0.0, 2048, Precision.bf16)
    assert (align.image_aspect.value, train.image_aspect.value, train.group_by.value) == (
        "square",
        "pad",
        "modality_length",
    )


@pytest.mark.parametrize(("train", "full", "lora"), [("official", 2e-5, 2e-4), ("demo", 1.5e-3, 5e-3)])
def test_the_learning_rate_follows_the_adapter_unless_it_is_given(
    compose: Compose, train: str, full: float, lora: float
) -> None:
    assert compose(f"train={train}", "adapter=full").train.lr == full
    assert compose(f"train={train}", "adapter=lora_r16").train.lr == lora
    assert compose(f"train={train}", "adapter=lora_r16", "train.lr=3e-4").train.lr == 3e-4


def test_alpha_and_the_names_follow_the_rank(compose: Compose) -> None:
    preset = compose("adapter=lora_r16")
    assert (preset.adapter.rank, preset.adapter.alpha, preset.name) == (16, 32, "tiny-raw-lora_r16")
    mine = compose("adapter=lora_r8", "adapter.rank=12", "adapter.alpha=48")
    assert (mine.adapter.rank, mine.adapter.alpha, mine.name) == (12, 48, "tiny-raw-lora_r12")
    assert compose("adapter=lora_r8", "adapter.rank=12").adapter.alpha == 24


def test_full_fine_tuning_has_no_lora_settings(compose: Compose) -> None:
    adapter = compose("adapter=full").adapter
    assert (adapter.kind, adapter.rank, adapter.alpha, adapter.target_modules) == (AdapterKind.full, 0, 0, [])


def test_only_the_demo_freezes_the_connector(compose: Compose) -> None:
    demo = compose("train=demo").train
    assert demo.freeze_connector and demo.cache_visual_tokens
    official = compose("train=official").train
    assert not official.freeze_connector and not official.cache_visual_tokens


def test_an_experiment_preset_sets_several_groups_and_gives_way_to_the_command_line(compose: Compose) -> None:
    config = compose("experiment=mgm_2b_lora_24gb")
    assert (config.model.name, config.adapter.name, config.train.name) == ("mgm_2b", "lora_r16", "official")
    assert config.train.global_batch_size % config.train.micro_batch_size == 0
    mine = compose("experiment=mgm_2b_lora_24gb", "adapter=lora_r8", "train=demo")
    assert (mine.adapter.name, mine.train.name, mine.model.name) == ("lora_r8", "demo", "mgm_2b")


def test_debug_comes_last_of_all_presets(compose: Compose) -> None:
    config = compose("experiment=mgm_2b_lora_24gb", "debug=fast")
    assert config.train.max_steps == 3
    assert config.train.global_batch_size == 8
    assert config.tracker.mode is TrackerMode.disabled


def test_paths_follow_the_root(compose: Compose) -> None:
    assert compose("paths.root=/big/disk").paths.store == "/big/disk/store"
    assert compose("paths.root=/big/disk", "paths.store=/fast/store").paths.store == "/fast/store"


def test_a_named_policy_is_an_enum(compose: Compose) -> None:
    assert compose("data.bad_rows=fail").data.bad_rows is BadRows.fail


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["adapter=full", "adapter.rank=8"], "takes no rank"),
        (["train.cache_visual_tokens=true", "train.freeze_connector=false"], "needs train.freeze_connector=true"),
        (["train.micro_batch_size=5"], "is not a multiple of"),
        (["devices=3", "train.micro_batch_size=8"], "x devices=3"),
        (["devices=0"], "devices=0 must be a finite number above 0"),
        (["zero.offload_optimizer=cpu"], "needs zero=2 or zero=3"),
        (["data.recaptioned_path=x.jsonl"], "data=blip2"),
        (["eval.benchmarks=[]"], "is empty"),
        (["eval.benchmarks=[demo,vqav3]"], "['vqav3']"),
        (["eval.benchmarks=[demo,demo]"], "has one twice"),
        (["eval.mmmu.split=val"], "'validation'"),
        (["eval.gqa.batch_size=0"], "eval.gqa.batch_size=0"),
        (["eval.custom.metrics=[cider]"], "the first one scores a single answer"),
        (["eval.custom.metrics=[exact_match,rouge]"], "['rouge']"),
        (["eval.robustness.severities=[0]"], "allowed are 1 (slight) to 5 (severe)"),
        (["eval.robustness.corruptions=[blur,blur]"], "has one twice"),
        (["eval.judge.url=http://localhost:1/v1"], "eval.judge.model"),
        (["eval.judge.url=http://example.org/v1", "eval.judge.model=m"], "https://"),
        (["eval.judge.url='https://me:secret@example.org/v1'", "eval.judge.model=m"], "secret"),
        (["adapter.target_modules=[q_proj,fc1]"], "fc1"),
        (["model.image_grid=0"], "model.image_grid=0"),
        (["model.image_grid=1", "model.image_global=true"], "needs model.image_grid=2"),
        (["model.image_size_aux=700"], "multiple of 32"),
        (["train.lr=1e400"], "finite"),
        (["train.lr=nan"], "finite"),
        (["name=../../x"], "not a folder name"),
        (["name=a/b"], "not a folder name"),
        (["device=cpu", "train.precision=fp16"], "needs a GPU"),
        (["launch.timeout_s=0"], "launch.timeout_s=0"),
        (["launch.max_restarts=-1"], "launch.max_restarts=-1"),
        (["launch.hostfile=hosts", "launch.machines=here"], "does not read it"),
        (["launch.remote_shell=[]"], "is empty"),
        (["adapter=prompt", "adapter.rank=4"], "prompt does not read adapter.rank: it takes adapter.tokens"),
        (["adapter.tokens=4"], "lora does not read adapter.tokens"),
        (["adapter=vera", "adapter.alpha=2"], "vera does not read adapter.alpha"),
        (["adapter=prefix", "adapter.tokens=0"], "adapter.tokens=0"),
        (["adapter=prefix", "model=mgm_2b"], "set it to false"),
        (["adapter=bottleneck", "adapter.target_modules=[q_proj]"], "['o_proj', 'down_proj']"),
        (["adapter=bitfit", "adapter.norms=false"], "would train nothing: the LLM of model=tiny has no biases"),
        (["adapter=adalora", "zero=2"], "use zero=none"),
        (["adapter=adalora", "adapter.adalora.initial_rank=8"], "must be above adapter.rank=8"),
        (["adapter=adalora", "adapter.adalora.final_share=0.9"], "their sum must be below 1"),
        (["adapter=adalora", "adapter.adalora.every_steps=0"], "every_steps=0"),
        (["adapter=adalora", "adapter.adalora.orthogonality=-1"], "orthogonality=-1"),
        (["adapter=adalora", "adapter.adalora.warmup_share=1"], "warmup_share=1"),
        (["adapter=dora", "zero=3"], "adapter.use_dora=true reads weights that zero=3 has not gathered"),
        (["adapter=prefix", "eval.merge_adapter=true"], "no weight can hold adapter.kind=prefix"),
        (["adapter=vera", "zero=3"], "adapter.kind=vera reads weights"),
        (["adapter=dora", "adapter.init=pissa"], "use one of them"),
        (["adapter.pissa_iterations=4"], "give both or neither"),
        (["adapter=pissa", "adapter.pissa_iterations=-1"], "pissa_iterations=-1"),
        (["adapter=lora_plus", "adapter.b_lr_ratio=0"], "b_lr_ratio=0"),
        (["adapter=qlora", "device=cpu"], "trains on a GPU only"),
        (["adapter=qlora", "zero=2"], "4-bit weights cannot be shared out"),
        (["adapter=qlora", "adapter.base_bits=8"], "allowed are 16"),
        (["adapter=qlora", "adapter.use_dora=true"], "adapter.base_bits=4 has rounded"),
        (["train.optimize_vision_tower=true"], "changes the towers; set it to false"),
        (["train.vision_tower_lr=0"], "train.vision_tower_lr=0"),
    ],
)
def test_impossible_combinations_are_refused_with_their_reason(
    compose: Compose, overrides: list[str], says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(*overrides)
    assert says in str(caught.value)


def test_all_faults_are_named_at_once(compose: Compose) -> None:
    with pytest.raises(ConfigError) as caught:
        compose("train.lr=-1", "adapter.rank=0", "name=..")
    for part in ("train.lr", "adapter.rank", "name"):
        assert part in str(caught.value)


def test_the_page_on_configuration_has_every_key_and_every_choice() -> None:
    from mgm_exp.spelling import groups, known_keys

    page = (CONF.parent / "docs" / "configuration.md").read_text(encoding="utf-8")
    leaves = [key for key in known_keys() if not any(other.startswith(f"{key}.") for other in known_keys())]
    assert [key for key in leaves if f"| `{key}` |" not in page] == []
    choices = [(group, choice) for group, names in groups().items() if group != "sweeps" for choice in names]
    assert [choice for choice in choices if f"| `{choice[0]}` |" not in page or f"`{choice[1]}`" not in page] == []
    sweeps = (CONF.parent / "docs" / "sweeps.md").read_text(encoding="utf-8")
    assert [name for name in SWEEP_NAMES if f"| `{name}` |" not in sweeps] == []
