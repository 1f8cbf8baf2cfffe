"""Looks before the run leaps: everything that can be found wrong in a second is found before anything is computed.

Checks the device, the packages that the configuration needs, the model folder, the data files and the benchmark files,
and takes the fingerprints that the keys of the stages are made of.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from mgm_exp.alerts import check_alerts
from mgm_exp.capacity import refuse_what_does_not_fit
from mgm_exp.config import (
    LEFT_OUT,
    Attention,
    BlockKernel,
    CaptionEngine,
    CaptionPolicy,
    CudaGraphs,
    Device,
    ExperimentConfig,
    ModelFamily,
    Precision,
    RecipeEngine,
    plain,
)
from mgm_exp.data import source_fingerprint
from mgm_exp.data.recipe import operators_of
from mgm_exp.data.stages import Origin, user_origins
from mgm_exp.errors import ConfigError, DataError, MissingDependencyError, ModelError
from mgm_exp.kernels import attention_of, check_attention, check_kernels
from mgm_exp.model.backbones import backbone_of_type
from mgm_exp.model.execution import has_liger
from mgm_exp.model.known import KNOWN
from mgm_exp.monitor import check_monitor
from mgm_exp.stages import Sources
from mgm_exp.store import cached_tree_fingerprint, file_sha256, fingerprint, read_json

# The tiny base that is shipped with the package.
TINY = Path(__file__).parent / "model" / "tiny"


@dataclass(frozen=True)
class Preflight:
    """What was found.

    Args:
        sources: Fingerprints of everything that enters from outside, device and attention that will be used.
        model_folder: The checkpoint folder, resolved.
        needs_demo: Whether the generated demo data is used for training or evaluation.
        notes: Sentences for the log.
    """

    sources: Sources
    model_folder: Path
    needs_demo: bool
    notes: tuple[str, ...]


def check(config: ExperimentConfig, *, is_data_only: bool = False) -> Preflight:
    """Checks everything that can be checked without computing.

    Args:
        config: What is to be run.
        is_data_only: Nothing is trained and evaluated: what only that needs may be missing.

    Raises:
        UserError: naming what is missing, what was looked for, and what to do.
    """
    device = resolve_device(config.device, config.devices)
    check_monitor(config.monitor)
    check_alerts(config.alerts)
    _check_recipe(config)
    folder = model_folder(config)  # before the benchmarks: who has no model has to download it first
    if not is_data_only:
        _check_packages(config, device)
        _check_precision(config, device)
        _check_padding_free(config, folder, device)
        _check_attention_dropout(config, folder)
        _check_block_kernel(config)
        _check_benchmarks(config)
    of_family = _check_family(config, folder)
    data = config.data
    own = user_origins(config)
    needs_demo = len(own) < 2 or ("demo" in asked_benchmarks(config) and not is_data_only)
    captioner = None
    if data.recaption and data.recaptioned_path is None:
        captioner = _captioner_fingerprint(config)
    notes = [
        f"device: {device}, {config.devices} process(es)",
        f"model: {config.model.name} from {folder.name}/",
        *of_family,
    ]
    if config.model.path is None and config.model.name == "tiny":
        notes.append("this is a demo: the tiny model and its data are generated; its scores say nothing of MGM-2B")
    if own and "demo" in config.eval.benchmarks and not is_data_only:
        notes.append(
            "evaluation uses the generated demo questions (eval.benchmarks=[demo]), which your own data does not "
            "teach; give eval=textvqa and its files for a real score"
        )
    if not is_data_only:
        memory = refuse_what_does_not_fit(config, device)
        notes += [memory] if memory else []
    return Preflight(
        sources=Sources(
            model=model_fingerprint(config, folder),
            align=_data_fingerprint(own.get("align")),
            instruct=_data_fingerprint(own.get("instruct")),
            captioner=captioner,
            recaptioned=_recaptioned_fingerprint(config),
            scorer=_scorer_fingerprint(config),
            operators=_operator_fingerprints(config),
            device=device,
            attention=attention_of(config, device),
            has_liger=has_liger(device),
        ),
        model_folder=folder,
        needs_demo=needs_demo,
        notes=tuple(notes),
    )


def check_scoring(config: ExperimentConfig, *, base: str | None = None) -> Preflight:
    """What :func:`check` finds out of device, model and benchmarks, for a model that is there already: the data that
    it was trained on may be gone.

    Args:
        config: Of the model, and of how it is scored.
        base: Fingerprint of the base where that is not needed any more (all weights were trained); None: it is read.

    Raises:
        UserError: as :func:`check`.
    """
    device = resolve_device(config.device, config.devices)
    check_attention(config)
    _check_precision(config, device)
    _check_benchmarks(config)
    folder = TINY if base is not None else model_folder(config)
    return Preflight(
        sources=Sources(
            model=base or model_fingerprint(config, folder),
            align=None,
            instruct=None,
            captioner=None,
            recaptioned=None,
            device=device,
            attention=attention_of(config, device),
        ),
        model_folder=folder,
        needs_demo="demo" in asked_benchmarks(config),
        notes=(),
    )


def resolve_device(wanted: Device, devices: int) -> str:
    """``cpu`` or ``cuda``; asking for a GPU that is not there is an error, not a slow run.

    Raises:
        MissingDependencyError: no GPU, or fewer than ``devices``.
    """
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted is Device.cpu or (wanted is Device.auto and not there):
        return "cpu"
    if not there:
        raise MissingDependencyError(
            f"device=cuda was given, but torch {torch.__version__} sees no GPU.",
            advice="Use device=cpu (or auto), or install a CUDA build of torch and check nvidia-smi.",
        )
    if devices > there:
        raise MissingDependencyError(
            f"devices={devices} was given, but torch sees {there} GPU(s).", advice=f"Use devices={there} or fewer."
        )
    return "cuda"


def model_folder(config: ExperimentConfig) -> Path:
    """The checkpoint folder: ``model.path``, or the tiny base that is shipped.

    Raises:
        ModelError: the folder is not there or holds no config.json.
    """
    if config.model.path is None:
        if config.model.name != "tiny":
            raise ModelError(
                f"model={config.model.name} needs a checkpoint folder and model.path is not set.",
                advice=KNOWN[config.model.name].how_to_get()
                if config.model.name in KNOWN
                else f"Give model.path=/folder/of/{config.model.name} (config.json and safetensors files).",
            )
        return TINY
    folder = Path(config.model.path).expanduser()
    if not folder.is_dir():
        raise ModelError(f"model.path={config.model.path} is not a folder.", advice="Check the path.")
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model.path={config.model.path} holds no config.json, so it is not a checkpoint folder.",
            advice="Give the folder with config.json, the tokenizer and the safetensors files.",
        )
    _check_backbone(config.model.name, folder)
    return folder.resolve()


def _check_backbone(name: str, folder: Path) -> None:
    """A preset's settings are of its language model's kind: those of another one would be obeyed in silence."""
    known = KNOWN.get(name)
    stated = read_json(folder / "config.json").get("model_type")
    found = backbone_of_type(stated)
    if known is not None and found is not None and found.name != known.backbone:
        fitting = [other for other, model in KNOWN.items() if model.backbone == found.name]
        raise ModelError(
            f"model={name} is {known.title}, built on {known.llm}, but {folder / 'config.json'} says {stated!r}, "
            f"which is built on {found.name.capitalize()}.",
            advice=f"Use model={' or model='.join(fitting)}, or give the folder of {known.title}.",
        )


def _check_family(config: ExperimentConfig, folder: Path) -> list[str]:
    """A model of transformers is looked at before anything is computed; what a run of it goes without is said once."""
    if config.model.family is not ModelFamily.hf:
        return []
    from mgm_exp.model.hf.preflight import check_hf

    return [*check_hf(config, folder), f"not part of a run with model=hf: {LEFT_OUT}"]


def _check_packages(config: ExperimentConfig, device: str) -> None:
    if config.zero.stage and importlib.util.find_spec("deepspeed") is None:
        raise MissingDependencyError(
            f"zero={config.zero.stage} needs DeepSpeed, which is not installed in this environment.",
            advice="pip install deepspeed, or use zero=none (plain PyTorch).",
        )
    check_kernels(config, device)
    if config.adapter.base_bits == 4:
        from mgm_exp.model.adapters.quantized import check_quantization

        check_quantization(device)


def _check_recipe(config: ExperimentConfig) -> None:
    """Data-Juicer is asked for before hours of captioning, not after them."""
    data = config.data
    wanted = [name for name in operators_of(data.recipe) if data.recipe.engine is RecipeEngine.data_juicer]
    if wanted or (data.recaption and data.captioner.engine is CaptionEngine.data_juicer):
        from mgm_exp.data.data_juicer import require_data_juicer

        require_data_juicer()


def _check_precision(config: ExperimentConfig, device: str) -> None:
    if device == "cpu" and config.eval.precision is Precision.fp16:
        raise ConfigError("eval.precision=fp16 needs a GPU, and none is used here; use fp32 or bf16 on the CPU.")
    if device == "cpu" and config.train.precision is Precision.fp16:
        raise ConfigError("train.precision=fp16 needs a GPU, and none is used here; use fp32 or bf16 on the CPU.")
    if device == "cpu" and config.model.attn_implementation in (
        Attention.flash_attention_2,
        Attention.flash_attention_3,
    ):
        raise MissingDependencyError(
            f"model.attn_implementation={config.model.attn_implementation.value} runs on GPUs only, and this run uses "
            "the CPU.",
            advice="Use sdpa, eager or auto.",
        )


def _check_padding_free(config: ExperimentConfig, folder: Path, device: str) -> None:
    """Of the attentions that know where sequences begin, only the package flash-attn has dropout."""
    if not config.train.padding_free or attention_of(config, device) != "sdpa":
        return
    dropout = read_json(folder / "config.json").get("attention_dropout")
    if dropout:
        raise ConfigError(
            f"train.padding_free=true was given, and {folder / 'config.json'} has attention_dropout={dropout}: sdpa "
            "has no dropout for several sequences in one row.",
            advice="Use train.padding_free=false, or model.attn_implementation=flash_attention_2.",
        )


def _check_attention_dropout(config: ExperimentConfig, folder: Path) -> None:
    """A CUDA graph draws from one generator for all trials of a pack."""
    if config.train.cuda_graphs is CudaGraphs.none:
        return
    dropout = read_json(folder / "config.json").get("attention_dropout")
    if dropout:
        raise ConfigError(
            f"train.cuda_graphs=packs was given, and {folder / 'config.json'} has attention_dropout={dropout}, which "
            "each trial draws for itself.",
            advice="Use train.cuda_graphs=none.",
        )


def _check_block_kernel(config: ExperimentConfig) -> None:
    """It is made for one kind of LLM, and captioning may come before the first model is built."""
    if config.train.block_kernel is BlockKernel.fused:
        from mgm_exp.model.folders import source_of_section
        from mgm_exp.model.fused_block import check_fusable
        from mgm_exp.model.resolve import resolve_config

        check_fusable(resolve_config(source_of_section(plain(config.model))))


def asked_benchmarks(config: ExperimentConfig) -> set[str]:
    """The benchmarks whose questions are needed: at the end, and at validation points."""
    validation = config.train.validation
    extra = [validation.benchmark] if validation.every_steps is not None and validation.benchmark is not None else []
    return {*config.eval.benchmarks, *extra}


def _check_benchmarks(config: ExperimentConfig) -> None:
    """Reads the questions of every benchmark and looks for their images: nothing may be missing after the training."""
    from mgm_exp.evaluate import load_benchmark, variants

    for name in sorted(asked_benchmarks(config) - {"demo"}):
        benchmark = load_benchmark(name, config)
        _ = benchmark.questions
        if name in config.eval.benchmarks:
            for variant in variants(benchmark, config.eval.robustness):
                _ = variant.questions


def model_fingerprint(config: ExperimentConfig, folder: Path) -> str:
    """Hash of the checkpoint folder and of the towers given beside it (files that a loader may read, no others)."""
    folders = [folder]
    for key in ("vision_tower", "vision_tower_aux"):
        given = getattr(config.model, key)
        if given is None:
            continue
        tower = Path(given).expanduser()
        if not tower.is_dir():
            raise ModelError(f"model.{key}={given} is not a folder.", advice="Give the folder of the tower's files.")
        folders.append(tower)
    cache = Path(config.paths.store) / "fingerprints.json"
    files = cached_tree_fingerprint(folders, cache)
    views = {key: getattr(config.model, key) for key in ("image_grid", "image_global", "image_size_aux")}
    given_views = {key: value for key, value in views.items() if value is not None}
    return fingerprint({"files": files, **given_views}) if given_views else files


def _captioner_fingerprint(config: ExperimentConfig) -> str:
    from mgm_exp.data.captioner import DEMO_CAPTIONER

    path = config.data.captioner.path
    if path is None and config.data.path is not None:
        raise ConfigError(
            "data=blip2 with your own data.path needs data.captioner.path=/folder/of/blip2 (the demo captioner knows "
            "generated scenes only), or data.recaptioned_path=FILE with captions made elsewhere."
        )
    folder = DEMO_CAPTIONER if path is None else Path(path).expanduser()
    if (folder / "manifest.json").is_file() and not (folder / "config.json").is_file():
        return _run_fingerprint(config, folder)
    return _folder_fingerprint(config, "data.captioner.path", str(folder))


def _run_fingerprint(config: ExperimentConfig, folder: Path) -> str:
    """Of a run that captions: what it trained, and the base that it trained it on."""
    trained = [folder / name for name in ("adapter", "model") if (folder / name).is_dir()]
    if not trained:
        raise ModelError(
            f"data.captioner.path={folder} is a run that holds neither adapter/ nor model/.",
            advice="Give a run that was completed.",
        )
    base = (read_json(folder / "manifest.json").get("model") or {}).get("fingerprint")
    cache = Path(config.paths.store) / "fingerprints.json"
    return fingerprint({"trained": cached_tree_fingerprint(trained, cache), "base": base})


def _scorer_fingerprint(config: ExperimentConfig) -> str | None:
    captioner = config.data.captioner
    if not config.data.recaption or captioner.policy is not CaptionPolicy.keep_if_better:
        return None
    return _folder_fingerprint(config, "data.captioner.scorer.path", str(captioner.scorer.path))


def _operator_fingerprints(config: ExperimentConfig) -> dict[str, str]:
    """Hashes of the models that operators of the recipe run."""
    recipe, found = config.data.recipe, {}
    for name in operators_of(recipe):
        path = getattr(getattr(recipe, name), "path", None)
        if path is not None:
            found[name] = _folder_fingerprint(config, f"data.recipe.{name}.path", path)
    return found


def _folder_fingerprint(config: ExperimentConfig, key: str, path: str) -> str:
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{key}={path} is not a model folder (no config.json in it).",
            advice="Give a local folder in transformers format with safetensors files; nothing is downloaded.",
        )
    return cached_tree_fingerprint([folder], Path(config.paths.store) / "fingerprints.json")


def _data_fingerprint(origin: Origin | None) -> str | None:
    """The rows' bytes and, for each image they name, its size and modification time."""
    return None if origin is None else source_fingerprint(origin.path, origin.image_root)


def _recaptioned_fingerprint(config: ExperimentConfig) -> str | None:
    path = config.data.recaptioned_path
    if path is None:
        return None
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(
            f"data.recaptioned_path={path} is not a file.", advice="Give the recaptioned rows (.json or .jsonl)."
        )
    return file_sha256(file)
