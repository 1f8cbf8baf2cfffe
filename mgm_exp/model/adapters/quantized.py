"""The LLM's linear layers in 4 bits (QLoRA, Dettmers et al., arXiv 2305.14314), by bitsandbytes.

NF4 with double quantisation; computed in the dtype that the weights had. Training only: the adapter is saved as a
plain LoRA, and evaluated and merged over the weights as they were.
"""

from __future__ import annotations

import torch
from torch import nn

from mgm_exp.errors import MissingDependencyError
from mgm_exp.model.layout import LlmLayout


def check_quantization(device: str) -> None:
    """Whether a 4-bit base can be trained on this machine; imports nothing heavy.

    Raises:
        MissingDependencyError: no GPU, or no bitsandbytes.
    """
    from importlib.util import find_spec

    if device != "cuda":
        raise MissingDependencyError(
            f"adapter.base_bits=4 (QLoRA) trains on a GPU only, and this run uses device {device}.",
            advice="Use adapter=lora_r16, or a machine with a CUDA GPU.",
        )
    if find_spec("bitsandbytes") is None:
        raise MissingDependencyError(
            "adapter.base_bits=4 (QLoRA) needs bitsandbytes, which is not installed in this environment.",
            advice="pip install bitsandbytes, or use adapter=lora_r16.",
        )


def quantize(model: nn.Module, llm: LlmLayout) -> None:
    """Replaces the linear layers of all blocks, one at a time; the model must lie on its device."""
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise MissingDependencyError(
            "adapter.base_bits=4 (QLoRA) needs bitsandbytes, which cannot be imported here.",
            advice=f"pip install bitsandbytes ({error}).",
        ) from error
    for place in llm.places(llm.linears):
        home, _, name = place.rpartition(".")
        linear = model.get_submodule(place)
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, nn.Parameter)
        device, dtype = weight.device, weight.dtype
        with torch.device("meta"):
            small = Linear4bit(
                weight.shape[1],
                weight.shape[0],
                bias=False,
                compute_dtype=dtype,
                compress_statistics=True,
                quant_type="nf4",
            )
        # Quantised as it is moved to its device
        small.weight = Params4bit(
            weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4", module=small
        ).to(device)
        small.bias = bias  # type: ignore[assignment]
        setattr(model.get_submodule(home), name, small)
    model.is_loaded_in_4bit = True  # type: ignore[assignment] # PEFT asks for it
    model.train(model.training)
