"""Prompt tuning (Lester et al., arXiv 2104.08691): learnt embeddings in front of every sequence.

They are put in front of the merged sequence, padding included, as the LLM's body begins, and taken off its result, so
that nobody around the body sees them. They begin as the embeddings of words drawn from the seed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mgm_exp.config import AdapterKind
from mgm_exp.errors import ModelError
from mgm_exp.model.adapters.base import ADVICE, Adapter, Cost, Shapes, by_official_name, copy_exactly
from mgm_exp.model.layout import LlmLayout

NAME = "learnt_prompt"
# In PEFT's files.
PEFT_NAME = "prompt_embeddings"


class LearntPrompt(nn.Module):
    """(n, hidden) embeddings, scaled as the LLM's inputs are."""

    def __init__(self, n: int, hidden: int, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n, hidden, device=device))

    def forward(self, batch: int, dtype: torch.dtype) -> Tensor:
        """(batch, n, hidden)"""
        return self.weight.to(dtype).expand(batch, -1, -1)


class Prompt(Adapter):
    """Learnt tokens in front of every sequence."""

    kind = AdapterKind.prompt
    peft_type = "PROMPT_TUNING"
    why_not_merged = "its learnt tokens belong to the input, and no weight of the model can hold them"

    def added(self, llm: LlmLayout) -> Shapes:
        return {f"{llm.body}.{NAME}.weight": (self.section.tokens, llm.hidden)}

    def patterns(self, llm: LlmLayout) -> list[str]:
        return [rf"{re.escape(llm.body)}\.{NAME}\.weight"]

    def cost(self, llm: LlmLayout) -> Cost:
        return Cost(tokens=self.section.tokens)

    def put_in(self, model: nn.Module, llm: LlmLayout, seed: int) -> dict[str, Any]:
        prompt = _attach(model, llm, self.section.tokens)
        words: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, words.weight.shape[0], (self.section.tokens,), generator=generator)  # type: ignore[union-attr, index, arg-type]
        with torch.no_grad():
            prompt.weight.copy_(words(ids.to(prompt.weight.device)))
        return {
            "peft_type": self.peft_type,
            "task_type": "CAUSAL_LM",
            "num_virtual_tokens": self.section.tokens,
            "token_dim": llm.hidden,
            "num_layers": llm.n_blocks,
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM",
        }

    def to_files(self, stated: dict[str, Any], state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
        [tensor] = state.values()
        return stated, {PEFT_NAME: tensor}

    @classmethod
    def open(
        cls, model: nn.Module, llm: LlmLayout, stated: dict[str, Any], tensors: Mapping[str, Tensor]
    ) -> frozenset[str]:
        embeddings = one_tensor(tensors)
        _attach(model, llm, embeddings.shape[0])
        name = f"{llm.body}.{NAME}.weight"
        return copy_exactly({name: by_official_name(model)[name]}, {name: embeddings}, "adapter", widen=True)


def one_tensor(tensors: Mapping[str, Tensor]) -> Tensor:
    """What a file of prompt or prefix tuning holds.

    Raises:
        ModelError: anything else.
    """
    if set(tensors) != {PEFT_NAME} or tensors[PEFT_NAME].dim() != 2:
        raise ModelError(f"The adapter must hold {PEFT_NAME} and nothing else: {sorted(tensors)[:3]}.", advice=ADVICE)
    return tensors[PEFT_NAME]


def body_of(model: nn.Module, llm: LlmLayout, name: str) -> nn.Module:
    """The LLM's body, which must not have a part of this name.

    Raises:
        ModelError: it has.
    """
    body = model.get_submodule(llm.body)
    if hasattr(body, name):
        raise ModelError("The model has an adapter already.", advice="Start from the base model.")
    return body


def is_first(kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of the body begins its sequences: no cache, or an empty one."""
    past = kwargs.get("past_key_values")
    return past is None or past.get_seq_length() == 0


def widen_mask(kwargs: dict[str, Any], n: int) -> None:
    """The attention mask of a call, with n more places in front that are all seen.

    Raises:
        ModelError: the caller made a mask that is not (B, length).
    """
    mask = kwargs.get("attention_mask")
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise ModelError("Learnt tokens need an attention mask of the form (batch, length).")
    kwargs["attention_mask"] = torch.cat([mask.new_ones(len(mask), n), mask], 1)


def _attach(model: nn.Module, llm: LlmLayout, n: int) -> LearntPrompt:
    body = body_of(model, llm, NAME)
    prompt = LearntPrompt(n, llm.hidden, next(body.parameters()).device)
    body.add_module(NAME, prompt)
    dropped: list[int] = []  # positions that belong to the prompt, for each call that runs

    def before(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        begins = is_first(kwargs)
        widen_mask(kwargs, n)
        if (positions := kwargs.get("position_ids")) is not None:
            kwargs["position_ids"] = positions + n
        if begins:
            embeds = kwargs.get("inputs_embeds")
            if embeds is None:
                embeds = model.get_input_embeddings()(kwargs.pop("input_ids"))  # type: ignore[operator]
                kwargs["input_ids"] = None
            kwargs["inputs_embeds"] = torch.cat([prompt(len(embeds), embeds.dtype), embeds], 1)
            if positions is not None:
                first = torch.arange(n, device=positions.device).expand(len(positions), n)
                kwargs["position_ids"] = torch.cat([first, positions + n], 1)
        dropped.append(n if begins else 0)
        return args, kwargs

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[:, dropped.pop() :]
        return output

    body.register_forward_pre_hook(before, with_kwargs=True)
    body.register_forward_hook(after, with_kwargs=True)
    return prompt
