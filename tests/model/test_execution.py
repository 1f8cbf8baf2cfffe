"""How a model is run while it trains: each switch against the plain way."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from mgm_exp.errors import ModelError
from mgm_exp.model import MGMForConditionalGeneration, apply_adapter, load_model, set_trainable
from mgm_exp.model.decoding import can_decode
from mgm_exp.model.execution import Execution, blocks_of, compile_obstacle, run_as
from mgm_exp.model.offload import activations_on_host
from mgm_exp.model.padding_free import in_one_row
from mgm_exp.model.varlen import VARLEN

Trained = Callable[..., MGMForConditionalGeneration]


@pytest.fixture(scope="module")
def trained(golden: Any) -> Trained:
    """A model with LoRA that has learnt something, ready to be trained on."""

    def make(
        kind: str = "lora", *, attention: str = "sdpa", dropout: float = 0.0, dtype: torch.dtype = torch.float32
    ) -> MGMForConditionalGeneration:
        model = load_model(golden / "model", attn_implementation=attention).to(dtype)
        modules = ["q_proj", "v_proj", "down_proj"]
        adapter = {"kind": kind, "rank": 4, "alpha": 8, "dropout": dropout, "target_modules": modules}
        adapter = adapter if kind == "lora" else {"kind": kind}
        apply_adapter(model, adapter, seed=1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        set_trainable(model, "instruct", adapter)
        model.train()
        return model

    return make


def step(model: MGMForConditionalGeneration, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss and gradients by name."""
    model.zero_grad()
    torch.manual_seed(7)
    loss = model.loss(batch)
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def ragged(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows of clearly different lengths."""
    mask = batch["attention_mask"].bool().clone()
    places = mask[0].nonzero().squeeze(1)
    mask[0, places[len(places) // 2 + 1 :]] = False
    return {**batch, "attention_mask": mask}


# -- the loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_fused_loss_in_chunks_is_the_loss_in_float64(trained: Trained, batch, kind: str) -> None:
    model = trained(kind, dtype=torch.float64)
    wide = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    plain = step(model, wide)
    for kernel, chunk in (("fused", None), ("fused", 2), ("torch", 3)):
        run_as(model, Execution(loss_kernel=kernel, loss_chunk=chunk))
        assert largest_difference(plain, step(model, wide)) <= 1e-12


def test_fused_lora_layers_learn_what_pefts_do_in_float64(trained: Trained, batch) -> None:
    model = trained(dropout=0.1).double()
    wide = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    plain = step(model, wide)
    run_as(model, Execution(lora_kernel="fused"))
    assert sum("forward" in vars(module) for module in model.modules()) == 3 * len(blocks_of(model))
    found = step(model, wide)
    assert largest_difference(plain, found) <= 1e-12 * max(float(tensor.abs().max()) for tensor in plain.values())


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("blocks", [0, True])
def test_norms_and_gates_as_one_operation_learn_what_gemmas_do_in_float64(
    trained: Trained, batch, kind: str, blocks: bool | int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers' norm computes in float32 whatever it is given
    monkeypatch.setattr(GemmaRMSNorm, "forward", lambda self, x: self._norm(x) * (1.0 + self.weight))
    model = trained(kind, dropout=0.3).double()
    for block in blocks_of(model):
        block.mlp.act_fn = ACT2FN["gelu_pytorch_tanh"]
    wide = ragged({key: value.double() if value.is_floating_point() else value for key, value in batch.items()})
    if blocks:
        model.enable_gradient_checkpointing(blocks)
    plain = step(model, wide)
    prompts = {key: wide[key] for key in ("input_ids", "attention_mask", "images", "images_aux")}
    logits = model.eval()(**prompts).logits
    model.train()
    run_as(model, Execution(lora_kernel="fused", last_block="learnt", block_kernel="fused", padding_free=True))
    found = step(model, wide)
    assert largest_difference(plain, found) <= 1e-12 * max(float(tensor.abs().max()) for tensor in plain.values())
    assert largest_difference(plain, found) > 0
    assert can_decode(model.eval())
    assert torch.equal(model(**prompts).logits, logits)


def test_gates_of_another_activation_are_refused_before_a_step(trained: Trained) -> None:
    with pytest.raises(ModelError, match="GELU by tanh, and this LLM has GELUActivation"):
        run_as(trained(), Execution(block_kernel="fused"))


# -- the last block ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("blocks", [0, True])
def test_a_last_block_at_learnt_positions_learns_what_the_whole_one_does_in_float64(
    trained: Trained, batch, kind: str, padding_free: bool, blocks: bool | int
) -> None:
    model = trained(kind, dropout=0.3).double()
    wide = ragged({key: value.double() if value.is_floating_point() else value for key, value in batch.items()})
    if blocks:
        model.enable_gradient_checkpointing(blocks)
    whole = step(model, wide)
    rows: list[int] = []
    blocks_of(model)[-1].mlp.register_forward_hook(lambda module, given, out: rows.append(out[..., 0].numel()))
    run_as(model, Execution(lora_kernel="fused", last_block="learnt", padding_free=padding_free))
    found = step(model, wide)
    merged = model.merged(wide)[2]
    learnt = int((merged[:, 1:] != -100).sum())
    assert set(rows) == {learnt} and learnt < merged.numel() / 2
    assert largest_difference(whole, found) <= 1e-12 * max(float(tensor.abs().max()) for tensor in whole.values())


def test_an_adapter_may_be_put_in_afterwards(golden: Any, batch) -> None:
    adapter = {"kind": "lora", "rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": ["o_proj", "up_proj"]}
    wide = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    found = []
    for last_block in ("whole", "learnt"):
        model = load_model(golden / "model").double()
        run_as(model, Execution(last_block=last_block))
        apply_adapter(model, adapter, seed=1)
        set_trainable(model, "instruct", adapter)
        model.train()
        found.append(step(model, wide))
    assert largest_difference(*found) <= 1e-12


def test_where_nothing_is_learnt_every_gradient_is_zero(trained: Trained, batch) -> None:
    model = trained()
    run_as(model, Execution(lora_kernel="fused", last_block="learnt"))
    found = step(model, {**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert len(found) > 1 and not any(bool(tensor.any()) for tensor in found.values())


def test_a_model_whose_last_block_is_narrow_answers_as_before(trained: Trained, batch) -> None:
    model = trained()
    prompts = {key: batch[key] for key in ("input_ids", "attention_mask", "images", "images_aux")}
    answers, logits = model.generate(**prompts, max_new_tokens=4), model(**prompts).logits
    run_as(model, Execution(lora_kernel="fused", last_block="learnt"))
    step(model, batch)
    assert torch.equal(model(**prompts).logits, logits)  # training, but not for a loss
    assert torch.equal(model.generate(**prompts, max_new_tokens=4), answers)
    assert can_decode(model.eval())


# -- padding-free --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "a block-diagonal mask"])
def test_a_batch_without_padding_learns_what_the_padded_one_does_in_float64(
    trained: Trained, batch, attention: str
) -> None:
    model = trained(dtype=torch.float64)
    wide = ragged({key: value.double() if value.is_floating_point() else value for key, value in batch.items()})
    plain = step(model, wide)
    run_as(model, Execution(padding_free=True))
    assert model.config._attn_implementation == VARLEN
    if attention != "sdpa":
        model.config._attn_implementation = "sdpa"
    assert largest_difference(plain, step(model, wide)) <= 1e-12


def test_fused_lora_layers_drop_without_padding_what_they_drop_with_it(trained: Trained, batch) -> None:
    model = trained(dropout=0.3).double()
    wide = ragged({key: value.double() if value.is_floating_point() else value for key, value in batch.items()})
    padded = step(model, wide)
    run_as(model, Execution(lora_kernel="fused", padding_free=True))
    assert largest_difference(padded, step(model, wide)) <= 1e-12 * max(float(t.abs().max()) for t in padded.values())


def test_in_fp32_it_is_within_rounding_and_generation_is_what_it_was(trained: Trained, batch) -> None:
    model = trained()
    uneven = ragged(batch)
    plain = step(model, uneven)
    prompts = {key: uneven[key] for key in ("input_ids", "attention_mask", "images", "images_aux")}
    answers = model.generate(**prompts, max_new_tokens=4)
    run_as(model, Execution(padding_free=True))
    found = step(model, uneven)
    assert abs(float(found["loss"] - plain["loss"])) <= 5e-6
    assert largest_difference(plain, found) <= 1e-5 * max(float(tensor.abs().max()) for tensor in plain.values())
    assert torch.equal(model.generate(**prompts, max_new_tokens=4), answers)


def test_the_row_says_where_sequences_begin_and_learns_nothing_across_a_border() -> None:
    embeds = torch.arange(12.0).reshape(3, 4, 1)
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 0], [0, 0, 1, 1]]).bool()
    labels = torch.arange(12).reshape(3, 4)
    row = in_one_row(embeds, mask, labels)
    assert row.inputs_embeds.flatten().tolist() == [0, 1, 2, 10, 11]
    assert row.position_ids.tolist() == [[0, 1, 2, 0, 1]]
    assert row.borders.tolist() == [0, 3, 5] and row.longest == 3
    assert row.labels.tolist() == [[-100, 1, 2, -100, 11]]


# -- activations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_recomputing_some_blocks_changes_no_bit(trained: Trained, batch, blocks: int) -> None:
    model = trained(dropout=0.1)
    plain = step(model, batch)
    calls: list[int] = []
    for place, block in enumerate(blocks_of(model)):
        block.mlp.register_forward_pre_hook(lambda *_, place=place: calls.append(place))
    model.enable_gradient_checkpointing(blocks)
    found = step(model, batch)
    assert all(torch.equal(plain[name], found[name]) for name in plain)
    assert sorted(calls) == sorted([0, 1, *range(blocks)])


@pytest.mark.parametrize("is_recomputed", [False, True])
def test_activations_on_the_host_change_no_bit(trained: Trained, batch, is_recomputed: bool, monkeypatch) -> None:
    from mgm_exp.model import offload

    model = trained(dropout=0.1)
    plain = step(model, batch)
    if is_recomputed:
        model.enable_gradient_checkpointing()
    run_as(model, Execution(offloads=True))
    monkeypatch.setattr(offload, "SMALLEST", 1)  # the golden model's activations are kilobytes
    copies: list[int] = []
    copied = offload._copied
    monkeypatch.setattr(offload, "_copied", lambda *args: copies.append(1) or copied(*args))
    found = step(model, batch)
    assert len(copies) >= (2 if is_recomputed else 20)
    assert all(torch.equal(plain[name], found[name]) for name in plain)


def test_what_several_operations_keep_is_copied_once_and_weights_stay() -> None:
    x = torch.randn(64, 64, requires_grad=True)
    weights = [torch.randn(64, 64, requires_grad=True) for _ in range(3)]
    with activations_on_host(weights, smallest=0) as moved:
        y = x.tanh()
        total = torch.stack([y @ w for w in weights]).square().sum()
    ours = torch.autograd.grad(total, [x, *weights])
    y = x.tanh()
    theirs = torch.autograd.grad(torch.stack([y @ w for w in weights]).square().sum(), [x, *weights])
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert len(moved) == 2  # y, and what is squared


# -- compilation ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_blocks_are_one_compilation_and_draw_the_same_dropout(trained: Trained, batch) -> None:
    if obstacle := compile_obstacle("cpu"):
        pytest.skip(obstacle)
    from torch._dynamo.utils import counters

    model = trained(dropout=0.1)
    names = [name for name, _ in model.named_parameters()]
    plain = step(model, batch)
    prompts = {key: batch[key] for key in ("input_ids", "attention_mask", "images", "images_aux")}
    answers = model.generate(**prompts, max_new_tokens=3)
    counters.clear()
    run_as(model, Execution(compiles=True))
    found = step(model, batch)
    assert counters["stats"]["unique_graphs"] == 1
    assert abs(float(found["loss"] - plain["loss"])) <= 5e-6
    assert largest_difference(plain, found) <= 1e-4 * max(float(tensor.abs().max()) for tensor in plain.values())
    assert [name for name, _ in model.named_parameters()] == names
    copy.deepcopy(model.state_dict())
    assert torch.equal(model.generate(**prompts, max_new_tokens=3), answers)


def test_a_model_whose_blocks_are_not_known_says_so() -> None:
    from transformers import PreTrainedModel

    class Bare(PreTrainedModel):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)
            self.only = torch.nn.Linear(2, 2)

        def get_decoder(self) -> torch.nn.Module:
            return self.only

    with pytest.raises(ModelError, match="blocks of its language model"):
        blocks_of(Bare())
