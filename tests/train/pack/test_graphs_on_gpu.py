"""CUDA graphs as a GPU records and replays them. Without one nothing here runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mgm_exp.config import AdapterConfig, AdapterKind, Attention, CudaGraphs, Device, Precision, plain
from mgm_exp.model.padding_free import Padding
from mgm_exp.train.listener import Listener
from mgm_exp.train.metrics_file import read_rows
from mgm_exp.train.pack.capture import CannotRecord, CudaRecorder
from mgm_exp.train.pack.graphs import Graphs
from mgm_exp.train.pack.lora import Rows
from mgm_exp.train.pack.trials import Pack, Trial
from mgm_exp.train.stop import StopRequest

from ..conftest import experiment, job_in

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


class Body:
    """Of one trial: embeddings times a factor, where they are read."""

    def __init__(self, asks: bool = False) -> None:
        self.device, self.asks = torch.device("cuda", 0), asks
        self.factor = nn.Parameter(torch.full((4,), 2.0, device=self.device))
        self.rows = Rows(trials=(0,), samples=1, lengths=[8])
        self.rows.learnt = [Padding(torch.arange(8, device=self.device), (1, 8))]
        self.graphs = Graphs(self, self.rows, [[self.factor]], CudaRecorder(self.device))

    def __call__(self, embeds: Tensor, mask: Tensor, positions: Tensor, read: Tensor) -> Tensor:
        found = embeds * self.rows.factor(self.factor) * mask[..., None] + positions[..., None]
        if self.asks and torch.cuda.is_current_stream_capturing():
            found = found * found.sum().item()
        return found.flatten(0, 1)[read]

    def gradients(self, value: float) -> tuple[float, float]:
        """Of the factor, and of the embeddings, of a pass in which all are ``value``."""
        embeds = torch.full((1, 8, 4), value, device=self.device, requires_grad=True)
        hidden = self.graphs.hidden(embeds, torch.ones(1, 8, dtype=torch.bool, device=self.device))[0, :8]
        expected = value * self.factor.detach() + torch.arange(8, device=self.device)[:, None]
        assert torch.equal(hidden.detach(), expected)
        hidden.sum().backward()
        assert embeds.grad is not None
        assert self.factor.grad is not None
        return float(self.factor.grad[0]), float(embeds.grad[0, 0, 0])


def test_a_recorded_pass_reads_what_is_there_now() -> None:
    body = Body()
    assert body.gradients(1.0) == (8, 2)  # launched
    body.factor.grad = None
    assert [body.gradients(value) for value in (1.0, 2.0, 3.0)] == [(8, 2), (24, 2), (48, 2)]
    with torch.no_grad():
        body.factor.fill_(5.0)
    assert body.gradients(1.0) == (56, 5)
    assert (body.graphs.counts.recorded, body.graphs.counts.replayed) == (1, 4)


def test_what_waits_for_the_gpu_is_named_and_the_gpu_goes_on() -> None:
    body = Body(asks=True)
    before = torch.cuda.current_stream()
    body.gradients(1.0)
    with pytest.raises(CannotRecord, match="could not be recorded as a CUDA graph"):
        body.gradients(1.0)
    assert torch.cuda.current_stream() == before
    assert float(torch.ones(3, device=body.device).sum()) == 3


@pytest.mark.parametrize(("precision", "near"), [(Precision.fp32, 5e-6), (Precision.bf16, 5e-2)])
def test_a_pack_learns_with_graphs_what_it_learns_without(tmp_path: Path, precision: Precision, near: float) -> None:
    def losses(graphs: CudaGraphs) -> tuple[list[list[float]], list[str]]:
        jobs, said = [], list[str]()
        for number, rank in enumerate((2, 4)):
            adapter = AdapterConfig(f"lora_r{rank}", AdapterKind.lora, rank, 8.0, 0.0, ["q_proj", "v_proj", "up_proj"])
            given: dict[str, Any] = {"adapter": adapter, "seed": number, "steps": 8, "precision": precision, "lr": 1e-3}
            config = plain(experiment(**given))
            config["device"], config["train"]["cuda_graphs"] = Device.cuda.value, graphs.value
            config["model"]["attn_implementation"] = Attention.sdpa.value
            job = job_in(tmp_path, name=f"{graphs.value}-{number}", **given)
            jobs.append(type(job)(**{**vars(job), "config": config}))
        trials = [Trial(job, Listener()) for job in jobs]
        Pack(said.append).train(trials, StopRequest())
        for trial in trials:
            trial.result()
        return [[row["loss"] for row in read_rows(job.metrics) if "event" not in row] for job in jobs], said

    replayed, said = losses(CudaGraphs.packs)
    launched, _ = losses(CudaGraphs.none)
    assert "small passes were replayed by" in said[-1]
    assert not said[-1].startswith("pack: 0 of")
    for mine, other in zip(replayed, launched, strict=True):
        assert mine == pytest.approx(other, abs=near)
