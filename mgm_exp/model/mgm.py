"""MGM (Mini-Gemini): an LLM that reads images through two towers and patch info mining.

Notable features:
- the LLM is transformers' own Gemma or Llama, by the configuration (`mgm_exp.model.backbones`); all else is one code;
- tensor names in memory are the official ones, so checkpoints load and save without renaming;
- image features enter a Gemma times sqrt(hidden), as all its input embeddings do;
- `loss` runs the 256k-word head at supervised positions only, a chunk at a time, in fp32;
- one embedding look-up, one gather and one head call a forward, whatever the batch holds, so that sharded training
  makes the same collective calls on every process;
- frozen towers run without gradient and stay in eval mode.

Li et al., "Mini-Gemini" (arXiv 2403.18814); official code github.com/dvlab-research/MGM, mgm/model/mgm_arch.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.gemma.modeling_gemma import GemmaModel
from transformers.models.llama.modeling_llama import LlamaModel

from mgm_exp.errors import ModelError
from mgm_exp.model import dropout_draws
from mgm_exp.model.clip import ClipTower
from mgm_exp.model.configuration import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    MGMConfig,
    MGMGemmaConfig,
    MGMLlamaConfig,
)
from mgm_exp.model.convnext import ConvNeXtBlock, ConvNeXtTower, join_stages
from mgm_exp.model.execution import Execution, checkpoint_first
from mgm_exp.model.features import tokens_of
from mgm_exp.model.head import LanguageHead
from mgm_exp.model.last_block import LastBlock, learnt_positions
from mgm_exp.model.layout import LlmLayout
from mgm_exp.model.low_rank_product import InputDropout
from mgm_exp.model.merge import plan_merge
from mgm_exp.model.mining import ConnectorLinear, mine, projection, shrunk
from mgm_exp.model.native_mining import mine_native
from mgm_exp.model.padding_free import Padding, in_one_row

# What a profile calls the towers, mining and the projector (`mgm_exp.train.profile`).
VISION_RANGE = "mgm_exp::vision"


class MGMModel(PreTrainedModel):
    """Everything but the head: both towers, patch info mining and the projector, put onto an LLM's body.

    `MGMGemmaModel` and `MGMLlamaModel` say onto which; the body's own modules (`embed_tokens`, `layers`, `norm`) and
    its forward pass are transformers'.
    """

    config: MGMConfig
    input_modalities = ("image", "text")

    def __init__(self, config: MGMConfig) -> None:
        super().__init__(config)
        for layer in self.layers:
            layer.mlp.act_fn = ACT2FN[config.activation]
        if config.mm_projector_type != "mlp2x_gelu":
            raise ModelError(
                f"mm_projector_type {config.mm_projector_type!r} in config.json is not supported: allowed is "
                "'mlp2x_gelu', the one MGM was trained with."
            )
        if config.vision_config is None or config.vision_aux_config is None:
            raise ModelError(
                "This MGM config describes no towers (vision_config, vision_aux_config).",
                advice="Load official folders with mgm_exp.model.load_model: it reads the towers' own configs.",
            )
        width, width_aux = config.mm_hidden_size, config.mm_hidden_size_aux
        self.vision_tower = ClipTower(config.vision_config, config.mm_vision_select_layer, config._attn_implementation)
        self.vision_tower_aux = ConvNeXtTower(config.vision_aux_config)
        if self.vision_tower.config.hidden_size != width or self.vision_tower_aux.num_channels != width_aux:
            raise ModelError(
                f"The towers do not fit the connector: CLIP is {self.vision_tower.config.hidden_size} wide and "
                f"mm_hidden_size is {width}; the ConvNeXt stages add up to {self.vision_tower_aux.num_channels} "
                f"channels and mm_hidden_size_aux is {width_aux}.",
                advice="Give the towers that this checkpoint was trained with.",
            )
        self.mm_projector = nn.Sequential(
            ConnectorLinear(width, config.hidden_size),
            nn.GELU(),
            ConnectorLinear(config.hidden_size, config.hidden_size),
        )
        self.vlm_uni_query_projector = projection(width, width)
        self.vlm_uni_aux_projector = projection(width_aux, width)
        self.vlm_uni_val_projector = projection(width_aux, width)
        self.mines_natively = True  # False: the official form, on the joined map
        # (2,) where whoever trains lets mining count its scores that are NaN and infinite; see `mine`
        self.mining_faults: Tensor | None = None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ConnectorLinear):
            bound = 1 / math.sqrt(module.in_features)
            init.uniform_(module.weight, -bound, bound)
            init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)
        if isinstance(module, ConvNeXtBlock):
            init.constant_(module.gamma, module.layer_scale_init)

    def mine_and_project(self, low: Tensor, high: Tensor | Sequence[Tensor], shrink: int = 1) -> Tensor:
        """Visual tokens: projector(low + mined detail).

        Args:
            low: (B, n², C).
            high: the joined map (B, C', H, W): mined in the official form; or the stages' own maps: natively.
            shrink: natively, the map is taken to be smaller by this factor.

        Returns:
            (B, n², hidden).
        """
        first: Any = self.mm_projector[0]
        dtype = first.weight.dtype
        low = low.to(dtype)
        connector = self.vlm_uni_query_projector, self.vlm_uni_aux_projector, self.vlm_uni_val_projector
        faults = self.mining_faults if self.training else None
        if isinstance(high, Tensor):
            mined = mine(low, high.to(dtype), *connector, faults)
        else:
            mined = mine_native(low, high, *connector, shrink=shrink, faults=faults)
        return self.mm_projector(low + mined)

    def _mine_and_project(self, low: Tensor, high: Tensor | Sequence[Tensor], shrink: int = 1) -> Tensor:
        # The aux and value inputs (B, 576, 64, 2880), and native patches, are large: recompute them like the layers
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(self.mine_and_project, low, high, shrink)
        return self.mine_and_project(low, high, shrink)

    def encode_images(self, images: Tensor | Sequence[Tensor], images_aux: Tensor | Sequence[Tensor]) -> Tensor:
        """Projected visual tokens, before the factor that the LLM's embeddings have (Gemma's sqrt(hidden)).

        Args:
            images: (B, 3, h, w); with `image_grid` g >= 2 (B, g²[+1], 3, h, w): crops row by row, global view last.
            images_aux: (B, 3, H, W).

        Returns:
            (B, N, hidden); N = n² patches, with a grid n² * (g² [+ 1]): global view first, then the crops.

        Raises:
            ModelError: shapes that do not belong together.
        """
        images, images_aux = _stacked(images, "images"), _stacked(images_aux, "images_aux")
        grid, has_global = int(self.config.image_grid), bool(self.config.image_global)
        n_views = grid * grid + int(has_global) if grid > 1 else 1
        expected, view_axis = (5, f"{n_views}, ") if grid > 1 else (4, "")
        if images.dim() != expected or (grid > 1 and images.shape[1] != n_views) or len(images) != len(images_aux):
            raise ModelError(
                f"images {tuple(images.shape)} and images_aux {tuple(images_aux.shape)} do not fit image_grid={grid}, "
                f"image_global={has_global}: expected (B, {view_axis}3, h, w) and (B, 3, H, W)."
            )
        return self.encode_seen(self.see_low(images), self.see_high(images_aux))

    def see_low(self, images: Tensor) -> Tensor:
        """CLIP's features: (B, [views,] 3, h, w) -> (B, [views,] n², C)."""
        if images.dim() == 4:
            return self.vision_tower(images)
        # Crops of all images first, then the global views
        n_crops = int(self.config.image_grid) ** 2
        has_global = images.shape[1] > n_crops
        crops = images[:, :n_crops].flatten(0, 1)
        seen = self.vision_tower(torch.cat([crops, images[:, -1]]) if has_global else crops)
        low = seen[: len(crops)].unflatten(0, (len(images), n_crops))
        return torch.cat([low, seen[len(crops) :, None]], dim=1) if has_global else low

    def see_high(self, images_aux: Tensor) -> Tensor | list[Tensor]:
        """What mining takes of (B, 3, H, W): the stages' own maps, or the joined one in the official form."""
        return self.vision_tower_aux(images_aux, joined=not self.mines_natively)

    def encode_seen(self, low: Tensor, high: Tensor | Sequence[Tensor]) -> Tensor:
        """Projected visual tokens of what `see_low` and `see_high` gave: (B, N, hidden); see `encode_images`."""
        is_native = self.mines_natively
        if not is_native and not isinstance(high, Tensor):
            high = join_stages(high)
        if low.dim() == 3:
            return self._mine_and_project(low, high)
        batch, grid = len(low), int(self.config.image_grid)
        crops, whole_low = low[:, : grid * grid].flatten(0, 1), low[:, -1].contiguous()
        if isinstance(high, Tensor):
            channels, height, width = high.shape[1:]
            blocks = high.reshape(batch, channels, grid, height // grid, grid, width // grid)
            blocks = blocks.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)  # (B g², C', H/g, W/g)
            tokens = self._mine_and_project(crops, blocks)  # (B g², n², hidden)
            tokens = tokens.reshape(batch, -1, tokens.shape[-1])
        else:
            # Upsampled stages do not end at the border of a crop: the crops are mined as one image
            together = _put_together(crops, batch, grid)  # (B, (g n)², C)
            tokens = _taken_apart(self._mine_and_project(together, high), grid)  # (B, g² n², hidden)
        if low.shape[1] > grid * grid:
            whole = (
                self._mine_and_project(whole_low, shrunk(high, grid))
                if isinstance(high, Tensor)
                else self._mine_and_project(whole_low, high, grid)
            )
            tokens = torch.cat([whole, tokens], dim=1)
        return tokens


def _put_together(low: Tensor, batch: int, grid: int) -> Tensor:
    """Patches of crops as those of one image: (B g², n², C) -> (B, (g n)², C), row-major."""
    n = round(low.shape[1] ** 0.5)
    rows = low.reshape(batch, grid, grid, n, n, -1).permute(0, 1, 3, 2, 4, 5)
    return rows.reshape(batch, (grid * n) ** 2, -1)


def _taken_apart(tokens: Tensor, grid: int) -> Tensor:
    """The reverse, crop by crop: (B, (g n)², D) -> (B, g² n², D)."""
    n = round(tokens.shape[1] ** 0.5) // grid
    rows = tokens.reshape(len(tokens), grid, n, grid, n, -1).permute(0, 1, 3, 2, 4, 5)
    return rows.reshape(len(tokens), grid * grid * n * n, -1)


class MGMGemmaModel(MGMModel, GemmaModel):
    """On Gemma's body (MGM-2B)."""

    config_class = MGMGemmaConfig


class MGMLlamaModel(MGMModel, LlamaModel):
    """On Llama's body (Vicuna: MGM-7B and 13B; Llama 3: MGM-8B)."""

    config_class = MGMLlamaConfig


BODIES: dict[str, type[MGMModel]] = {"gemma": MGMGemmaModel, "llama": MGMLlamaModel}


class MGMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """MGM with its language head. See the module's docstring; `load_model` makes one from a folder.

    The subclasses below have the official code's names, for the Auto classes and `config.json`; they add nothing.
    """

    config: MGMConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012 - transformers' own form
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - obeys tie_word_embeddings

    def __init__(self, config: MGMConfig) -> None:
        super().__init__(config)
        self.model = BODIES[config.backbone.name](config)
        self.vocab_size = config.vocab_size
        self.execution = Execution()
        self.lora_dropout: InputDropout | None = None  # see run_as, as for the next
        self.last_block: LastBlock | None = None
        self.lm_head = LanguageHead(config.hidden_size, config.vocab_size)
        self.post_init()

    @property
    def llm_layout(self) -> LlmLayout:
        """Names and sizes of the LLM's parts, which adapters are declared by."""
        return LlmLayout.of(self.config)

    @classmethod
    def from_pretrained(cls, folder: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """transformers' own, by the class that belongs to the folder's LLM; `load_model` reads official folders too."""
        head = (
            _HEADS[type(AutoConfig.from_pretrained(folder, local_files_only=True))]
            if cls is MGMForConditionalGeneration
            else cls
        )
        return super(MGMForConditionalGeneration, head).from_pretrained(folder, *args, **kwargs)

    def enable_gradient_checkpointing(self, blocks: bool | int | str = True) -> None:
        """Recomputes the LLM's layers and the mining in the backward pass (non-reentrant).

        Args:
            blocks: The first so many layers only; True: all.
        """
        self.activation_checkpointing_enable({"use_reentrant": False})
        self.disable_input_require_grads()  # only the reentrant form needs gradients at the input
        checkpoint_first(self, blocks)

    def merge(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        images: Tensor | Sequence[Tensor] | None = None,
        images_aux: Tensor | Sequence[Tensor] | None = None,
        visual_tokens: Tensor | None = None,
        seen: Mapping[str, Tensor] | None = None,
        padding_side: str | None = None,
        max_length: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Replaces each `IMAGE_TOKEN_INDEX` by an image's visual tokens; everything comes out scaled for the LLM.

        Args:
            input_ids, attention_mask, labels: (B, T).
            images, images_aux: pixels for `MGMModel.encode_images`; or
            visual_tokens: (n_images, N, hidden), what `encode_images` returned earlier; or
            seen: features of some or all images, and pixels of the others: `mgm_exp.model.features`.
            padding_side, max_length: default to the config's `tokenizer_padding_side`, `tokenizer_model_max_length`.

        Returns:
            inputs_embeds (B, L, hidden), attention_mask (B, L) bool, labels (B, L).

        Raises:
            ModelError: images and placeholders do not match.
        """
        if seen:
            with record_function(VISION_RANGE):
                visual_tokens = tokens_of(self.model, seen, images, images_aux)
        elif visual_tokens is None and images is not None:
            if images_aux is None:
                raise ModelError("images were given without images_aux: MGM needs both resolutions of each image.")
            with record_function(VISION_RANGE):
                visual_tokens = self.model.encode_images(images, images_aux)
        safe_ids = input_ids.masked_fill(input_ids == IMAGE_TOKEN_INDEX, 0)
        text = self.model.embed_tokens(safe_ids).flatten(0, 1)  # (B*T, D), scaled by Gemma's embed_tokens itself
        sources = [text]
        if visual_tokens is None:
            if bool((input_ids == IMAGE_TOKEN_INDEX).any()):
                raise ModelError(
                    f"input_ids hold {IMAGE_TOKEN_INDEX} (an image) but no images were given.",
                    advice="Pass images and images_aux, or visual_tokens.",
                )
            n_images, tokens_per_image = len(input_ids), 0  # nothing to insert, nothing to consume
        else:
            n_images, tokens_per_image = visual_tokens.shape[:2]
            visual = visual_tokens.to(text).flatten(0, 1)
            if self.config.embed_scale != 1.0:
                visual = visual * self.model.embed_tokens.embed_scale.to(text.dtype)
            sources.append(visual)
        sources.append(text.new_zeros(1, text.shape[-1]))
        plan = plan_merge(
            input_ids,
            attention_mask,
            labels,
            n_images=n_images,
            tokens_per_image=tokens_per_image,
            max_length=max_length or self.config.tokenizer_model_max_length,
            padding_side=padding_side or self.config.tokenizer_padding_side,
        )
        return torch.cat(sources)[plan.index], plan.attention_mask, plan.labels

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        images: Tensor | Sequence[Tensor] | None = None,
        images_aux: Tensor | Sequence[Tensor] | None = None,
        visual_tokens: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """The official convention: `.logits` (B, L, vocabulary, fp32) and `.loss` over the merged sequence.

        Args:
            input_ids: (B, T) with `IMAGE_TOKEN_INDEX` once for each image.
            images, images_aux, visual_tokens: see `merge`.
            labels: (B, T); the loss is the mean over supervised tokens (0 where there is none).
            logits_to_keep: only the last N positions go through the head; 0: all.
        """
        has_past = past_key_values is not None and past_key_values.get_seq_length() > 0
        if inputs_embeds is None and input_ids is None:
            raise ValueError("forward needs input_ids or inputs_embeds.")
        if inputs_embeds is None and input_ids is not None and not has_past:
            inputs_embeds, attention_mask, merged = self.merge(
                input_ids,
                attention_mask,
                labels,
                images=images,
                images_aux=images_aux,
                visual_tokens=visual_tokens,
            )
            labels = merged if labels is not None else None
            input_ids = None
        outputs = self.model(
            input_ids=input_ids if inputs_embeds is None else None,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:]).float()
        loss = None
        if labels is not None:
            target = labels[:, 1:].flatten()
            total = F.cross_entropy(logits[:, :-1].flatten(0, 1), target, ignore_index=IGNORE_INDEX, reduction="sum")
            loss = total / (target != IGNORE_INDEX).sum().clamp(min=1)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def loss(self, batch: Mapping[str, Any], normalizer: float | None = None) -> Tensor:
        """Training loss: summed cross-entropy of the supervised tokens over `normalizer`.

        The head runs at supervised positions only. Equal to `forward(...).loss` when `normalizer` is None.

        Args:
            batch: `input_ids`, `attention_mask`, `labels` (B, T), and `images` + `images_aux`, `visual_tokens` or
                `seen`.
            normalizer: number to divide by; None: the supervised tokens of this batch (at least 1).
        """
        given: dict[str, Any]
        inputs_embeds, attention_mask, labels = self.merged(batch)
        padding = None
        if self.execution.padding_free:
            row = in_one_row(inputs_embeds, attention_mask, labels)
            given, labels, padding = row.arguments(self.config._attn_implementation), row.labels, row.padding
        else:
            given = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        places, target = learnt_positions(labels)
        if self.lora_dropout is not None:
            narrow = Padding(places, labels.shape) if padding is None else padding.at(places)
            self.lora_dropout.drop = dropout_draws.dropout if padding is None else padding.dropout
            self.lora_dropout.drop_narrow = narrow.dropout
        with self.execution.keeping_activations(self):
            return self.loss_at(self.body(places[None], **given)[0], target, normalizer)

    def body(self, places: Tensor, **given: Any) -> Tensor:
        """The LLM's last hidden states, where they are read.

        Args:
            places: (rows, n) positions in the flattened batch.
            given: What the body is called with.

        Returns:
            (rows, n, hidden)
        """
        if self.last_block is None:
            hidden: Tensor = self.model(**given, use_cache=False).last_hidden_state
            return hidden.flatten(0, 1)[places]
        with self.last_block.reading(places):
            return self.model(**given, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    def merged(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """`merge` of a training batch; see `loss`."""
        return self.merge(
            batch["input_ids"],
            batch.get("attention_mask"),
            batch["labels"],
            images=batch.get("images"),
            images_aux=batch.get("images_aux"),
            visual_tokens=batch.get("visual_tokens"),
            seen=batch.get("seen"),
        )

    def loss_at(self, hidden: Tensor, target: Tensor, normalizer: float | None = None) -> Tensor:
        """The loss, from hidden states (N, D) and the tokens (N,) that are to follow them; see `loss`."""
        return self.lm_head(hidden, target) / (max(target.numel(), 1) if normalizer is None else normalizer)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        images: Tensor | Sequence[Tensor] | None = None,
        images_aux: Tensor | Sequence[Tensor] | None = None,
        visual_tokens: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Answers to a batch of prompts: greedy with a KV cache unless `kwargs` (transformers' own) say otherwise.

        Args:
            input_ids: (B, T) prompts, padded on any side.
            attention_mask: (B, T), True where a token is real; None: all are.
            images, images_aux, visual_tokens: see `merge`.
            kwargs: `max_new_tokens`, `eos_token_id`, `do_sample`, ... of `GenerationMixin.generate`.

        Returns:
            (B, new tokens): each row ends at its first stop token and is filled up with the padding token.
        """
        inputs_embeds, mask, _ = self.merge(
            input_ids,
            attention_mask,
            images=images,
            images_aux=images_aux,
            visual_tokens=visual_tokens,
            padding_side="left",
        )
        settings = {"do_sample": False, "num_beams": 1, "use_cache": True, "pad_token_id": self._filler()}
        was_training = self.training
        self.eval()  # no dropout, and checkpointed layers drop the cache while they train
        try:
            return super().generate(inputs_embeds=inputs_embeds, attention_mask=mask.long(), **(settings | kwargs))
        finally:
            self.train(was_training)

    def _filler(self) -> int | None:
        """What finished rows are filled up with: padding; a base Llama names none, and any stop token does."""
        stops = self.generation_config.eos_token_id
        first = stops[0] if isinstance(stops, (list, tuple)) and stops else stops
        return first if self.config.pad_token_id is None else self.config.pad_token_id


class MGMGemmaForCausalLM(MGMForConditionalGeneration):
    """MGM-2B's class."""

    config_class = MGMGemmaConfig


class MGMLlamaForCausalLM(MGMForConditionalGeneration):
    """The class of MGM-7B, 8B and 13B."""

    config_class = MGMLlamaConfig


_HEADS = {head.config_class: head for head in (MGMGemmaForCausalLM, MGMLlamaForCausalLM)}


def new_model(config: MGMConfig) -> MGMForConditionalGeneration:
    """A model of this configuration with new weights, of the class that belongs to its LLM."""
    return _HEADS[type(config)](config)


class LossModule(nn.Module):
    """Makes `model.loss` the forward of a module, so that the hooks of DDP and DeepSpeed fire around it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Mapping[str, Any], normalizer: float | None = None) -> Tensor:
        return self.model.loss(batch, normalizer)  # type: ignore[operator]


def _stacked(images: Tensor | Sequence[Tensor], name: str) -> Tensor:
    if isinstance(images, Tensor):
        return images
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) != 1:
        raise ModelError(f"{name}: the images of one batch must have one shape, these have {sorted(shapes)}.")
    return torch.stack(list(images))


for _head, _body in ((MGMGemmaForCausalLM, MGMGemmaModel), (MGMLlamaForCausalLM, MGMLlamaModel)):
    AutoConfig.register(_head.config_class.model_type, _head.config_class, exist_ok=True)
    AutoModel.register(_body.config_class, _body, exist_ok=True)
    for _auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        _auto.register(_head.config_class, _head, exist_ok=True)
