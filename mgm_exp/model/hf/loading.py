"""A folder that transformers wrote, as a model and a processor.

From this disk and from safetensors alone; code that lies in a folder is never run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mgm_exp.errors import MissingDependencyError, ModelError
from mgm_exp.model import resident
from mgm_exp.model.attention import AttentionChoice, choose_attention
from mgm_exp.model.execution import checkpoint_first
from mgm_exp.model.folders import read_json
from mgm_exp.model.hf.processor import HfProcessor

log = logging.getLogger(__name__)

_LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


def is_hf_folder(folder: Path) -> bool:
    """Whether a folder holds an image-text-to-text model of transformers (and no MGM). Reads no weights."""
    if not (folder / "config.json").is_file():
        return False
    config = read_json(folder / "config.json")
    return "mm_vision_tower_aux" not in config and config.get("model_type") in _known_types()


def open_config(folder: Path) -> Any:
    """The model's configuration.

    Raises:
        ModelError: it is no image-text-to-text model that this transformers knows.
    """
    from transformers import AutoConfig

    stated = read_json(folder / "config.json")
    kind = stated.get("model_type")
    if kind not in _known_types():
        foreign = " Its own code (auto_map) is never run." if "auto_map" in stated else ""
        raise ModelError(
            f"{folder} holds a model of type {kind!r}, which is no image-text-to-text model of the installed "
            f"transformers.{foreign}",
            advice="model=hf takes folders that AutoModelForImageTextToText loads (LLaVA, PaliGemma, Qwen2-VL, ...).",
        )
    with _in_words(folder, "config.json"):
        return AutoConfig.from_pretrained(str(folder), **_LOCAL)


def open_processor(folder: Path, max_length: int | None = None) -> HfProcessor:
    """The model's processor.

    Raises:
        ModelError: a part is missing, or it gives no exact labels.
        MissingDependencyError: a package that it needs is not there.
    """
    tokens = stop_tokens(folder)
    with _in_words(folder, "processor"):
        processor = _processor(folder)
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise ModelError(f"{folder} has no processor of images and text, only a {type(processor).__name__}.")
    stops = list(dict.fromkeys([*tokens, *([tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else [])]))
    pad = tokenizer.pad_token_id
    return HfProcessor(processor, stops, stops[0] if pad is None and stops else pad or 0, max_length)


def stop_tokens(folder: Path) -> list[int]:
    """Tokens that end an answer, of ``generation_config.json`` or else ``config.json``."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            found = read_json(folder / name).get("eos_token_id")
            if found is not None:
                return [int(token) for token in (found if isinstance(found, list) else [found])]
    return []


def meta_model(folder: Path) -> nn.Module:
    """The model without memory for its weights, as transformers builds it from ``config.json``."""
    from transformers import AutoModelForImageTextToText

    config = open_config(folder)
    with torch.device("meta"), _in_words(folder, "config.json"):
        model: nn.Module = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()  # type: ignore[operator]
    return model


def build_hf(
    section: Mapping[str, Any], *, device: str | torch.device, dtype: str | torch.dtype | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The model that a ``model`` section describes, in eval mode, and what was read from where.

    Every tensor must be there: transformers itself would fill up what is missing with random numbers.

    Raises:
        ModelError: files are missing, damaged or do not fit the configuration.
        MissingDependencyError: a device or a kernel that is not there.
    """
    folder = Path(str(section["path"])).expanduser()
    open_config(folder)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} holds no safetensors file.",
            advice="Pickled weights (.bin) are never loaded; save the model again with transformers.",
        )
    target = torch.device(device)
    weights_dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
    asked = section.get("attn_implementation")
    asked = str(getattr(asked, "value", asked or "auto"))
    attention = choose_attention(asked, target, weights_dtype)
    # Where nothing was asked for, parts that have no SDPA may choose what they have
    words = {} if asked == "auto" and attention.name == "sdpa" else {"attn_implementation": attention.name}
    model, report = resident.base_of(
        ("hf", str(folder.resolve()), str(target), str(weights_dtype), repr(attention), repr(words)),
        None,
        lambda: _read(folder, target, weights_dtype, attention, words),
    )
    if blocks := section.get("gradient_checkpointing"):
        _checkpoint_activations(model)
        checkpoint_first(model, blocks)
    return model, report


def _read(
    folder: Path, target: torch.device, weights_dtype: torch.dtype, attention: AttentionChoice, words: dict[str, str]
) -> resident.Loaded:
    from transformers import AutoModelForImageTextToText

    stamps = resident.stamps_of([folder])
    with _in_words(folder, "weights"), without_bars():
        model, found = AutoModelForImageTextToText.from_pretrained(
            str(folder), dtype=weights_dtype, use_safetensors=True, output_loading_info=True, **_LOCAL, **words
        )
    wrong = {key: sorted(map(str, found[key])) for key in ("missing_keys", "mismatched_keys") if found.get(key)}
    if wrong:
        shown = "; ".join(f"{len(names)} {key.replace('_', ' ')}, first {names[0]}" for key, names in wrong.items())
        raise ModelError(f"The weights in {folder} do not fit its config.json: {shown}.", advice="Copy it again.")
    model = model.to(target)
    model.eval()
    _greedy(model, folder)
    model.source_folder = str(folder)
    report = {
        "folder": str(folder),
        "type": model.config.model_type,
        "class": type(model).__name__,
        "unexpected": sorted(map(str, found.get("unexpected_keys") or ())),
        "attention": attention.name,
        "attention_reason": attention.reason,
        "dtype": str(weights_dtype).removeprefix("torch."),
        "device": str(target),
    }
    log.info("%s", report)
    return resident.Loaded(model, report, stamps)


def _greedy(model: Any, folder: Path) -> None:
    """Answers are greedy whatever the folder's own settings (Qwen2-VL's sample, and punish repetition)."""
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        eos_token_id=stop_tokens(folder) or before.eos_token_id,
        bos_token_id=before.bos_token_id,
        pad_token_id=before.pad_token_id,
    )


def _checkpoint_activations(model: Any) -> None:
    if not model.supports_gradient_checkpointing:
        raise ModelError(
            f"{type(model).__name__} cannot compute activations again in the backward pass.",
            advice="Give model.gradient_checkpointing=false.",
        )
    if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5
        model.activation_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable({"use_reentrant": False})


def _processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

    try:
        return AutoProcessor.from_pretrained(str(folder), **_LOCAL)
    except ImportError as error:
        if "VideoProcessor" not in str(error):
            raise
    # Its part for videos needs torchvision; images, which are all that is used here, do not
    return _without_videos(
        _class_of(folder),
        AutoImageProcessor.from_pretrained(str(folder), **_LOCAL),
        AutoTokenizer.from_pretrained(str(folder), **_LOCAL),
    )


def _class_of(folder: Path) -> type:
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    name = PROCESSOR_MAPPING_NAMES.get(read_json(folder / "config.json").get("model_type"))
    for file in ("processor_config.json", "preprocessor_config.json"):
        if (folder / file).is_file():
            name = read_json(folder / file).get("processor_class") or name
    if not isinstance(name, str):
        raise ModelError(f"{folder} does not say which processor it needs.")
    found: type = getattr(transformers, name)
    return found


def _without_videos(kind: Any, image_processor: Any, tokenizer: Any) -> Any:
    class ImagesOnly(kind):
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor" and argument is None:
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    template = getattr(tokenizer, "chat_template", None)
    return ImagesOnly(image_processor=image_processor, tokenizer=tokenizer, chat_template=template)


def _known_types() -> set[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    return set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


@contextmanager
def without_bars() -> Iterator[None]:
    """Keeps the progress bars of transformers out of a run's log."""
    from transformers.utils import logging as words

    was_shown = words.is_progress_bar_enabled()
    words.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            words.enable_progress_bar()


@contextmanager
def _in_words(folder: Path, what: str) -> Iterator[None]:
    """What transformers raises about a folder, as a sentence about it."""
    from safetensors import SafetensorError

    try:
        yield
    except ImportError as error:
        first = next((line for line in str(error).splitlines() if line.strip()), str(error))
        raise MissingDependencyError(f"The model in {folder} needs a package that is not here: {first}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise ModelError(f"{folder}: its {what} cannot be used: {first}") from error
