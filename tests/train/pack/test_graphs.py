"""CUDA graphs of small passes, as far as a machine without a GPU can tell: their logic, and that nothing in what they
record needs the host.

Here a recording is done again at the same addresses, and everything is made as hard as a GPU makes it: what it reads of
Python is what it read when it was recorded, results hold nothing before the first replay, and a replay spoils those of
all other recordings.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mgm_exp.config import AdapterConfig, AdapterKind, CudaGraphs
from mgm_exp.errors import Pruned
from mgm_exp.model import load_model
from mgm_exp.model.last_block import LastBlock
from mgm_exp.model.padding_free import Padding
from mgm_exp.train import TrainJob, run_stage
from mgm_exp.train.listener import Listener
from mgm_exp.train.metrics_file import read_rows
from mgm_exp.train.pack import graphs as pack_graphs
from mgm_exp.train.pack import trials as pack_trials
from mgm_exp.train.pack.capture import CannotRecord
from mgm_exp.train.pack.graphs import Graphs
from mgm_exp.train.pack.lora import LowRank, PackedLinear, Rows
from mgm_exp.train.pack.passes import Body, seen_from
from mgm_exp.train.pack.trials import Pack, Trial
from mgm_exp.train.stop import StopRequest

from ..conftest import MGM, job_in

# Name -> rank, alpha, peak rate, seed: no two alike.
TRIALS: dict[str, tuple[int, float, float, int]] = {
    "a": (2, 4.0, 1e-2, 3),
    "b": (4, 16.0, 3e-3, 4),
    "c": (3, 8.0, 1e-3, 5),
}
STEPS = 4


class FromHost(AssertionError):
    """Something was asked of the device, or brought to it."""


class WithoutHost(TorchDispatchMode):
    """No operation may read a value, choose a shape by one, draw a random number, or move a tensor to another device.

    Args:
        device: Where all tensors are.
    """

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "equal",
        "is_nonzero",
        "unique",
        "masked_select",
        "lift_fresh",
        "item",
    )
    DRAWING = ("dropout", "bernoulli", "rand", "normal", "uniform")

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.seen = device, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.FORBIDDEN or name.startswith("_pin") or any(word in name for word in self.DRAWING):
            raise FromHost(name)
        found = func(*args, **(kwargs or {}))
        chosen_by = tree_leaves(args[1]) if name.startswith(("index", "_index")) else []
        if any(isinstance(leaf, Tensor) and leaf.dtype is torch.bool for leaf in chosen_by):
            raise FromHost(f"{name} by a mask")
        tensors = [leaf for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, Tensor)]
        if others := {tensor.device.type for tensor in tensors} - {self.device}:
            raise FromHost(f"{name}: {others}")
        self.seen += 1
        return found


class Again:
    """A recording that does its work again."""

    def __init__(self, recorder: DoneAgain, work: Callable[[], Any], found: list[Tensor], rows: Rows) -> None:
        self._recorder, self._work, self._rows, self._frozen = recorder, work, rows, dict(vars(rows))
        self.found = found

    def replay(self) -> None:
        for other in self._recorder.made:
            if other is not self:
                spoil(other.found)
        before = dict(vars(self._rows))
        vars(self._rows).update(self._frozen)
        try:
            for old, new in zip(self.found, tree_leaves(self._work()), strict=True):
                with torch.no_grad():
                    old.copy_(new)
        finally:
            vars(self._rows).update(before)


class DoneAgain:
    """Records on the CPU.

    Args:
        fails: Raised at the recording of this number, counted from 1.
    """

    def __init__(self, fails: tuple[int, Exception] | None = None) -> None:
        self.made: list[Again] = []
        self._fails = fails

    def warm_up(self, work: Callable[[], Any]) -> None:
        work()

    def record(self, work: Any) -> tuple[Again, Any]:
        if self._fails is not None and len(self.made) + 1 >= self._fails[0]:
            raise self._fails[1]
        with WithoutHost("cpu") as watched:
            found = work()
        assert watched.seen
        spoil(tree_leaves(found))
        recording = Again(self, work, tree_leaves(found), work.__self__._rows)
        self.made.append(recording)
        return recording, found


def spoil(tensors: list[Tensor]) -> None:
    with torch.no_grad():
        for tensor in tensors:
            tensor.fill_(math.nan)


# -- packs ------------------------------------------------------------------------------------------------------------


def job_of(folder: Path, name: str, where: str, graphs: CudaGraphs = CudaGraphs.packs, **settings: Any) -> TrainJob:
    rank, alpha, lr, seed = TRIALS[name]
    adapter = AdapterConfig(f"lora_r{rank}", AdapterKind.lora, rank, alpha, 0.0, ["q_proj", "v_proj", "up_proj"])
    given = {"adapter": adapter, "lr": lr, "seed": seed, "steps": STEPS, "micro_batch": 2}
    job = job_in(folder, name=f"{where}-{name}", **{**given, **settings})
    train = {**job.config["train"], "cuda_graphs": graphs.value}
    return dataclasses.replace(job, config={**job.config, "device": "auto", "train": train})


def packed(
    jobs: dict[str, TrainJob], recorder: DoneAgain | None = None, listeners: dict[str, Listener] | None = None
) -> tuple[dict[str, Trial], list[str]]:
    trials = {name: Trial(job, (listeners or {}).get(name, Listener())) for name, job in jobs.items()}
    said: list[str] = []
    Pack(said.append, recorder_of=lambda device: recorder or DoneAgain()).train([*trials.values()], StopRequest())
    return trials, said


def losses(job: TrainJob) -> list[float]:
    return [row["loss"] for row in read_rows(job.metrics) if "event" not in row]


def weights(job: TrainJob) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(sorted(job.checkpoints.glob("step-*"))[-1] / "trainable.safetensors")


def farthest(a: TrainJob, b: TrainJob) -> float:
    mine, other = weights(a), weights(b)
    assert mine.keys() == other.keys()
    return max(float((mine[name].double() - other[name].double()).abs().max()) for name in mine)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several lengths among the short rows of the tests; trials go together as on a GPU, where there is none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(pack_trials, "CPU_FILLED", math.inf)
    monkeypatch.setattr(pack_trials, "CPU_POSITIONS", math.inf)
    monkeypatch.setattr(pack_graphs, "BUCKET", 8)


@pytest.fixture(params=["right", "left"])
def in_float64(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """All that is computed in fp32 is computed in float64; padding on either side."""
    from mgm_exp.train import assemble
    from mgm_exp.train.pack import base

    build = assemble.build_base

    def double(*args: Any) -> Any:
        model, report = build(*args)
        model.config.tokenizer_padding_side = request.param
        return model.double(), report

    for module in (assemble, base):
        monkeypatch.setattr(module, "build_base", double)
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor.double())
    yield request.param


def test_in_float64_replayed_trials_are_what_they_are_alone(tmp_path: Path, in_float64: str) -> None:
    """Two micro-batches of different sizes a step, changing lengths; one is pruned in the middle, one ends early."""
    names = "abc" if in_float64 == "right" else "bc"
    fewer: dict[str, dict[str, Any]] = {"c": {"steps": STEPS - 1}}
    alone = {name: job_of(tmp_path, name, "solo", CudaGraphs.none, **fewer.get(name, {})) for name in names}
    for job in alone.values():
        run_stage(job)

    def on_row(row: dict[str, Any]) -> None:
        if row["step"] == 2:
            raise Pruned("other trials do better")

    jobs = {name: job_of(tmp_path, name, "pack", **fewer.get(name, {})) for name in names}
    trials, said = packed(jobs, listeners={"a": Listener(on_row=on_row)})
    if "a" in jobs:
        with pytest.raises(Pruned):
            trials["a"].result()
        assert losses(jobs["a"]) == pytest.approx(losses(alone["a"])[:2], abs=1e-12)
    for name in "bc":
        trials[name].result()
        assert losses(jobs[name]) == pytest.approx(losses(alone[name]), abs=1e-12)
        assert farthest(jobs[name], alone[name]) < 1e-12
    (told,) = said
    replayed, _, small = told.removeprefix("pack: ").split()[:3]
    assert "were replayed by" in told
    assert int(small) > int(replayed) > 0


def test_it_changes_no_bit_whether_a_pass_is_replayed_and_memory_may_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pack replays, in another there is no memory left for the third recording."""
    replayed = {name: job_of(tmp_path, name, "replayed", freeze_connector=name == "c") for name in "bc"}
    launched = {name: job_of(tmp_path, name, "launched", freeze_connector=name == "c") for name in "bc"}
    eager = {name: job_of(tmp_path, name, "eager", CudaGraphs.none, freeze_connector=name == "c") for name in "bc"}
    packed(replayed)
    _, said = packed(launched, DoneAgain(fails=(3, torch.OutOfMemoryError("no more of it"))))
    packed(eager)
    assert said[0] == "pack: memory is full; passes are not replayed by CUDA graphs any more"
    assert len(said) == 2
    for name in "bc":
        assert losses(launched[name]) == losses(replayed[name])
        assert farthest(launched[name], replayed[name]) == 0
        assert losses(eager[name]) == pytest.approx(losses(replayed[name]), abs=5e-6)


def test_a_pass_that_cannot_be_recorded_ends_the_pack(tmp_path: Path) -> None:
    with pytest.raises(CannotRecord, match="it waits"):
        packed({"a": job_of(tmp_path, "a", "pack")}, DoneAgain(fails=(1, CannotRecord("it waits"))))


# -- the graphs themselves --------------------------------------------------------------------------------------------


class Toy:
    """A body of two trials: one factor each, times the rows of the trial."""

    def __init__(self) -> None:
        self.rows = Rows(samples=1)
        self.factors = [[nn.Parameter(torch.full((4,), value))] for value in (2.0, 3.0)]
        self.recorder = DoneAgain()
        self.graphs = Graphs(self.body, self.rows, self.factors, self.recorder)

    def body(self, embeds: Tensor, mask: Tensor, positions: Tensor, read: Tensor) -> Tensor:
        stacked = torch.stack([self.rows.factor(self.factors[trial][0]) for trial in self.rows.trials])
        return (embeds * stacked[:, None] * mask[..., None] + positions[..., None]).flatten(0, 1)[read]

    def learns(self, *places: Sequence[int]) -> None:
        self.rows.learnt = [
            Padding(torch.tensor(own), (1, length)) for own, length in zip(places, self.rows.lengths, strict=True)
        ]

    def gradients(self, trials: tuple[int, ...], length: int) -> list[float]:
        """Of each trial's factor, of a pass of ones; and the value is checked."""
        self.rows.trials, self.rows.lengths = trials, [length] * len(trials)
        self.learns(*[range(length) for _ in trials])
        embeds = torch.ones(len(trials), length, 4, requires_grad=True)
        hidden = self.graphs.hidden(embeds, torch.ones(len(trials), length, dtype=torch.bool))[:, :length]
        values = torch.stack([self.factors[trial][0].detach() for trial in trials])
        assert torch.equal(hidden.detach(), values[:, None] + torch.arange(length)[:, None])
        hidden.sum().backward()
        assert embeds.grad is not None
        assert torch.equal(embeds.grad, values[:, None].expand(-1, length, -1))
        return [float(self.factors[trial][0].grad[0]) for trial in trials]  # type: ignore[index]


def test_gradients_add_up_over_replays_and_are_nobody_elses() -> None:
    """Autograd keeps the first gradient that it is given as it is: it must not lie where the next replay writes."""
    toy = Toy()
    assert [toy.gradients((0, 1), 5) for _ in range(2)] == [[5, 5], [10, 10]]
    toy.factors[0][0].grad = toy.factors[1][0].grad = None
    assert [toy.gradients((0, 1), 5) for _ in range(3)] == [[5, 5], [10, 10], [15, 15]]
    assert toy.gradients((1,), 5) == [20]
    assert toy.gradients((1,), 5) == [25]
    assert toy.gradients((1, 0), 5) == [30, 20]
    assert (toy.graphs.counts.replayed, toy.graphs.counts.launched, toy.graphs.counts.recorded) == (5, 3, 2)


def test_nothing_of_an_earlier_pass_is_read() -> None:
    """Other values, other padding, the same shapes; padding on the left, so that positions change with it."""
    toy, draw = Toy(), torch.Generator().manual_seed(0)
    toy.rows.trials, toy.rows.at_end = (0, 1), True
    for lengths in ([5, 1], [2, 6], [6, 3], [1, 1]):
        toy.rows.lengths = lengths
        toy.learns([lengths[0] - 1, 0], [0])
        embeds = torch.randn(2, 6, 4, generator=draw)
        mask = torch.tensor([[place >= 6 - length for place in range(6)] for length in lengths])
        hidden = toy.graphs.hidden(embeds, mask)
        start = 6 - lengths[0]  # where the first trial's own row begins
        assert torch.equal(hidden[0, :2], embeds[0, [5, start]] * 2.0 + torch.tensor([[lengths[0] - 1], [0]]))
        assert torch.equal(hidden[1, 0], embeds[1, 6 - lengths[1]] * 3.0)
        weight = torch.randn(2, 4, generator=draw)
        (found,) = torch.autograd.grad(hidden[0, :2], toy.factors[0], weight)
        assert torch.allclose(found, (embeds[0, [5, start]] * weight).sum(0))
    assert toy.graphs.counts.replayed == 3


def test_what_moved_is_recorded_anew_and_what_was_not_used_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_graphs, "MOST", 2)
    toy = Toy()
    for length in (3, 3, 4, 4):
        toy.gradients((0, 1), length)
    assert len(toy.recorder.made) == 4  # forward and backward
    toy.factors[0][0].data = torch.full((4,), 7.0)  # elsewhere
    toy.gradients((0, 1), 4)
    assert len(toy.recorder.made) == 6
    with torch.no_grad():
        toy.factors[0][0].fill_(8.0)  # as an optimizer does it
    toy.gradients((0, 1), 4)
    assert len(toy.recorder.made) == 6
    for length in (5, 5, 4):
        toy.gradients((0, 1), length)
    assert len(toy.recorder.made) == 8
    assert toy.graphs.let_go()
    assert not toy.graphs.let_go()
    toy.gradients((0, 1), 4)
    assert len(toy.recorder.made) == 8


def test_only_small_passes_are_replayed() -> None:
    graphs = Toy().graphs
    assert graphs.length(8, 505) == 512
    assert graphs.length(8, 513) is None
    assert graphs.length(1, 1) == 8


def test_attention_and_positions_are_those_of_the_trial_alone() -> None:
    rows = Rows(trials=(0, 1), samples=1, lengths=[2, 4], at_end=True)
    positions = rows.positions(5, torch.device("cpu"))
    assert positions.tolist() == [[0, 0, 0, 0, 1], [0, 0, 1, 2, 3]]
    assert Rows(trials=(0, 1), samples=2).positions(3, torch.device("cpu")).tolist() == [[0, 1, 2]] * 4
    seen = seen_from(torch.tensor([[False, True, True]]))
    assert seen.tolist() == [[[[True, False, False], [False, True, False], [False, True, True]]]]


# -- nothing of it needs the host -------------------------------------------------------------------------------------


def test_what_needs_the_host_is_noticed() -> None:
    for asks in (
        lambda: torch.ones(2).sum().item(),
        lambda: torch.ones(2).nonzero(),
        lambda: torch.ones(2)[torch.ones(2) > 0],
        lambda: bool(torch.ones(2).all()),
        lambda: torch.tensor([1.0]),
        lambda: torch.nn.functional.dropout(torch.ones(2), 0.5),
        lambda: torch.ones(2).to("meta"),
    ):
        with pytest.raises(FromHost), WithoutHost("cpu"):
            asks()


def test_a_body_whose_tensors_have_no_values_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward on torch's meta device: whoever asks for a value, or brings a tensor from the CPU, fails."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)  # meta knows none
    monkeypatch.setattr(torch, "autocast", lambda *device, **settings: nullcontext())
    model: Any = load_model(MGM / "model").to("meta").train().requires_grad_(False)
    rows = Rows(trials=(0, 1), samples=2, lengths=[7, 8])
    factors: list[Tensor] = []
    for name, layer in [*model.model.layers.named_modules()]:
        if isinstance(layer, nn.Linear):
            sizes = [(layer.in_features, layer.out_features, rank) for rank in (2, 3)]
            parts = [(torch.empty(r, i, device="meta"), torch.empty(o, r, device="meta")) for i, o, r in sizes]
            factors += [part.requires_grad_() for pair in parts for part in pair]
            parent, _, last = name.rpartition(".")
            packed_layer = PackedLinear(layer, name, [LowRank(*pair, 0.5, 0.0) for pair in parts], rows)
            setattr(model.model.layers.get_submodule(parent), last, packed_layer)
    body = Body.__new__(Body)
    body._model = model
    model.last_block = LastBlock(model.model.layers[-1], rows)
    embeds = torch.empty(4, 16, model.config.hidden_size, device="meta", requires_grad=True)
    mask = torch.empty(4, 16, dtype=torch.bool, device="meta")
    read = torch.empty(2, 8, dtype=torch.int64, device="meta")
    for rows.at_end in (False, True):
        positions = rows.positions(16, embeds.device)
        with WithoutHost("meta"):
            hidden = body._through(embeds, mask, positions, read)
            found = torch.autograd.grad(hidden, [embeds, *factors], torch.empty_like(hidden))
        assert hidden.shape == (2, 8, model.config.hidden_size)
        assert len(found) == 1 + len(factors)
