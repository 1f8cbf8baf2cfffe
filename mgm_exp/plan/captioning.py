"""Captions of ``data=blip2``: the captioner's memory and time, from its description alone.

A BLIP-2 folder, or any image-text-to-text model, is built on the meta device; two published BLIP-2 models are known by
the name of their folder. What it keeps and runs is followed as for answers (:mod:`mgm_exp.plan.answers`): a tower
without gradients, a prompt with keys and values, one pass for each token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mgm_exp.config import CaptionEngine, CaptionPrecision, Device, ExperimentConfig
from mgm_exp.errors import ModelError
from mgm_exp.plan.lengths import Rows, rows_of
from mgm_exp.plan.memory import Moment
from mgm_exp.plan.phases import Phase, Writing, weights_alone

# Hidden size, layers, heads, vocabulary of the language models (model cards; OPT, arXiv 2205.01068, table 1).
KNOWN = {"blip2-opt-2.7b": (2560, 32, 32, 50_304), "blip2-opt-6.7b": (4096, 32, 32, 50_304)}
_QUERIES = 32
# Of a caption; a batch writes until its longest one has ended.
_USUAL_TOKENS = 12
_BEGIN, _SEE, _READ, _WRITE = (
    "loading the captioner",
    "looking at images",
    "reading the prompts",
    "writing the captions",
)


@dataclass(frozen=True)
class Captioner:
    """Sizes of a model that captions.

    Args:
        parameters, vision, text: All of them, those of the tower, those of the language model.
        linears: Elements of matrices that int8 stores in one byte.
        patches, vision_width, vision_mlp, vision_layers: Of the tower.
        tokens: Of an image, as the language model sees them.
        width, mlp, layers, key_width, vocabulary: Of the language model; ``key_width`` of all key heads.
    """

    parameters: int
    vision: int
    text: int
    linears: int
    patches: int
    vision_width: int
    vision_mlp: int
    vision_layers: int
    tokens: int
    width: int
    mlp: int
    layers: int
    key_width: int
    vocabulary: int


def captioning(config: ExperimentConfig, curated: Rows | None = None) -> Phase | str | None:
    """The phase; a sentence, where it cannot be planned and why; None where nothing is captioned.

    Both files may be missing: a folder that is not there is known by its name, or not at all.
    """
    data, section = config.data, config.data.captioner
    if not data.recaption or data.recaptioned_path is not None:
        return None
    if section.engine is CaptionEngine.data_juicer:
        return "captioning is not in the plan: with data.captioner.engine=data_juicer its memory is Data-Juicer's own"
    if section.path is None and data.path is not None:
        return "captioning is not in the plan: data.captioner.path is not set"
    try:
        sizes = sizes_of(section.path)
    except ModelError as error:
        return f"captioning is not in the plan: {error.message}"
    is_cpu = config.device is Device.cpu
    precision = section.precision
    if precision is CaptionPrecision.auto:
        precision = CaptionPrecision.fp32 if is_cpu else CaptionPrecision.bf16
    s = 4 if precision is CaptionPrecision.fp32 else 2
    weights = float(s * sizes.parameters)
    if precision is CaptionPrecision.int8:
        weights -= (s - 1) * sizes.linears
    images = rows_of(config, "align", curated)
    return _phase(config, sizes, weights, s, images)


def _phase(config: ExperimentConfig, sizes: Captioner, weights: float, s: int, images: int | None) -> Phase:
    section = config.data.captioner
    passes = section.captions_per_image + len(section.questions)
    prompt = sizes.tokens + (1 if section.prompt is None else len(section.prompt) // 4 + 1)
    written = min(section.max_new_tokens, 2 * _USUAL_TOKENS)
    batch = min(section.batch_size, images or section.batch_size)
    batches = math.ceil((images or 0) / batch) * passes
    per_token = 2.0 * (sizes.text - sizes.vocabulary * sizes.width) + 2.0 * sizes.width * sizes.vocabulary
    cache = _cached(sizes, s)
    reads = (images or 0) * (
        2.0 * sizes.patches * sizes.vision
        + 4.0 * sizes.vision_layers * sizes.patches**2 * sizes.vision_width
        + passes * prompt * per_token
    )
    writes = Writing(
        steps=float(batches * (written - 1)),
        flops=batch * per_token,
        bytes=weights * sizes.text / sizes.parameters + batch * prompt * cache,
        blocks=sizes.layers,
    )
    moments = captioning_moments(sizes, weights, s, section.batch_size, prompt, section.max_new_tokens)
    what = "its hours, which are not in those of the run, need the number of images: give plan.align_rows"
    return Phase("captioning", moments, images, reads, writes, what="" if images is not None else what)


def captioning_moments(
    sizes: Captioner, weights: float, itemsize: int, batch: int, prompt: int, most: int
) -> list[Moment]:
    """Loading, looking (``2 s n g + 4 s n w`` of a block, n patches, g the MLP's width, w the tower's), reading the
    prompts (as for answers), and writing up to the last token."""
    s, n, m = itemsize, batch * sizes.patches, batch * prompt
    cache = _cached(sizes, s)
    seen = float(s * batch * sizes.tokens * sizes.width)
    looking = s * n * (2 * sizes.vision_mlp + 4 * sizes.vision_width)
    logits = float(batch * sizes.vocabulary) * (s + 4)
    reading = cache * m + s * m * (2 * sizes.mlp + 4 * sizes.width) + (batch * prompt**2 if batch > 1 else 0)
    writing = cache * batch * (prompt + most) * (1 + 1 / sizes.layers) + s * m * sizes.width
    return [
        weights_alone(_BEGIN, weights, 0.0),
        weights_alone(_SEE, weights, float(looking)),
        weights_alone(_READ, weights, seen + reading, logits),
        weights_alone(_WRITE, weights, seen + writing, logits),
    ]


def _cached(sizes: Captioner, itemsize: int) -> float:
    return 2.0 * sizes.layers * sizes.key_width * itemsize


def sizes_of(path: str | None) -> Captioner:
    """Of a folder with ``config.json``, of a known one by its name, or of the demo's own captioner (None).

    Raises:
        ModelError: none of them; says what is missing.
    """
    if path is None:
        return _of_demo()
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        return _of_folder(str(folder), (folder / "config.json").stat().st_mtime_ns)
    if (folder / "manifest.json").is_file():
        raise ModelError(f"data.captioner.path={path} is a run; its captions take what its evaluation took.")
    if folder.name in KNOWN:
        return _of_name(folder.name)
    raise ModelError(
        f"data.captioner.path={path} holds no config.json, and its name is none of {', '.join(sorted(KNOWN))}."
    )


@lru_cache(maxsize=4)
def _of_folder(path: str, stamp: int) -> Captioner:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"), no_init_weights():
            model = AutoModelForImageTextToText.from_config(config)
            model.tie_weights()
        return _counted(model, config)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError, ImportError) as error:
        raise ModelError(f"{path}/config.json cannot be used: {type(error).__name__}: {str(error)[:200]}") from error


@lru_cache(maxsize=4)
def _of_name(name: str) -> Captioner:
    return _of_blip2(known_config(name))


def known_config(name: str) -> Any:
    """``Blip2Config`` of one of :data:`KNOWN`."""
    from transformers import Blip2Config, OPTConfig

    width, layers, heads, vocabulary = KNOWN[name]
    text = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
    return Blip2Config(text_config=text, num_query_tokens=_QUERIES)


@lru_cache(maxsize=1)
def _of_demo() -> Captioner:
    """The architecture of the captioner that is shipped: four small towers' blocks, two of the language model."""
    from transformers import Blip2Config, Blip2QFormerConfig, Blip2VisionConfig, OPTConfig

    vision = Blip2VisionConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, image_size=128, patch_size=8
    )
    former = Blip2QFormerConfig(
        vocab_size=8, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=256,
        encoder_hidden_size=128, cross_attention_frequency=1,
    )  # fmt: skip
    text = OPTConfig(
        vocab_size=50_272, hidden_size=96, word_embed_proj_dim=96, ffn_dim=256, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    return _of_blip2(Blip2Config(vision_config=vision, qformer_config=former, text_config=text, num_query_tokens=20))


def _of_blip2(config: Any) -> Captioner:
    import torch
    from transformers import Blip2ForConditionalGeneration
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        model = Blip2ForConditionalGeneration(config)
        model.tie_weights()
    return _counted(model, config)


def _counted(model: Any, config: Any) -> Captioner:
    """Counts tensors, and takes the sides that matter from the description; what it does not say is taken as usual."""
    text, vision = config.get_text_config(), config.vision_config
    width = int(text.hidden_size)
    heads = int(text.num_attention_heads)
    key_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(text, "head_dim", None) or width // heads)
    counts = {"vision": 0, "text": 0, "all": 0, "linears": 0}
    tables = {int(text.vocab_size)}
    seen: set[int] = set()
    for name, parameter in model.named_parameters():
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        n = parameter.numel()
        counts["all"] += n
        if "vision" in name or "visual" in name:
            counts["vision"] += n
        elif "language_model" in name or "text" in name:
            counts["text"] += n
        if parameter.dim() == 2 and parameter.shape[0] not in tables:
            counts["linears"] += n
    patches = (_side(vision.image_size) // _side(vision.patch_size)) ** 2 + 1 if hasattr(vision, "image_size") else 577
    vision_width = int(getattr(vision, "hidden_size", None) or vision.embed_dim)
    layers = int(text.num_hidden_layers)
    return Captioner(
        parameters=counts["all"],
        vision=counts["vision"],
        text=counts["text"] or counts["all"] - counts["vision"],
        linears=counts["linears"],
        patches=patches,
        vision_width=vision_width,
        vision_mlp=int(getattr(vision, "intermediate_size", None) or 4 * vision_width),
        vision_layers=int(getattr(vision, "num_hidden_layers", None) or vision.depth),
        tokens=int(getattr(config, "num_query_tokens", None) or patches),
        width=width,
        mlp=int(getattr(text, "ffn_dim", None) or getattr(text, "intermediate_size", None) or 4 * width),
        layers=layers,
        key_width=key_heads * head_dim,
        vocabulary=int(text.vocab_size),
    )


def _side(size: Any) -> int:
    """Some descriptions have both sides."""
    return int(size[0] if isinstance(size, (list, tuple)) else size)
