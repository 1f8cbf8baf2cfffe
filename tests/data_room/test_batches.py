from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mgm_exp.config import GroupBy
from mgm_exp.data import BatchPlan, StepLoader, collate
from mgm_exp.errors import ConfigError, DataError

from .conftest import GOLDEN

GROUPINGS = [grouping.value for grouping in GroupBy]


def shapes(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 60, n), rng.random(n) < 0.7


def plan_of(
    n: int, *, world_size: int = 1, rank: int = 0, micro: int = 2, accumulation: int = 2, **options: Any
) -> BatchPlan:
    lengths, has_image = shapes(n)
    size = options.pop("global_batch_size", micro * accumulation * world_size)
    return BatchPlan(
        lengths, has_image, global_batch_size=size, micro_batch_size=micro, world_size=world_size, rank=rank, **options
    )


plans = st.fixed_dictionaries(
    {
        "n": st.integers(1, 70),
        "micro": st.integers(1, 3),
        "accumulation": st.sampled_from([1, 2, 4]),
        "group_by": st.sampled_from(GROUPINGS),
        "seed": st.integers(0, 3),
    }
)


@settings(max_examples=60, deadline=None)
@given(plans, st.integers(1, 40))
def test_the_samples_of_a_plan_are_those_that_its_steps_hold(options: dict[str, Any], steps: int) -> None:
    plan = plan_of(**options, max_steps=steps)
    assert plan.samples() == sorted({i for step in range(steps) for i in plan.global_batch(step)})


@settings(max_examples=60, deadline=None)
@given(plans)
def test_each_epoch_sees_each_sample_once(options: dict[str, Any]) -> None:
    size = options["micro"] * options["accumulation"]
    epochs = 3
    plan = plan_of(**options, epochs=epochs)
    n = options["n"]
    assert plan.n_steps == -(-epochs * n // size)
    seen = [i for step in range(plan.n_steps) for i in plan.global_batch(step)]
    for epoch in range(epochs):
        assert sorted(seen[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert len(seen) == plan.n_steps * size


@settings(max_examples=40, deadline=None)
@given(plans, st.sampled_from([1, 2, 4]))
def test_the_global_batch_is_the_same_for_any_number_of_processes(options: dict[str, Any], world_size: int) -> None:
    options = {**options, "accumulation": 4, "max_steps": 12}
    size = options["micro"] * 4
    alone = plan_of(**options)
    ranks = [
        plan_of(**{**options, "global_batch_size": size}, world_size=world_size, rank=rank)
        for rank in range(world_size)
    ]
    for step in range(12):
        micro_batches = alone.step(step)
        for j, micro_batch in enumerate(micro_batches):
            assert ranks[j % world_size].step(step)[j // world_size] == micro_batch


@pytest.mark.parametrize("group_by", GROUPINGS)
def test_the_micro_batch_size_changes_the_split_and_not_the_global_batch(group_by: str) -> None:
    def sets(micro: int) -> list[list[int]]:
        plan = plan_of(61, micro=micro, global_batch_size=8, group_by=group_by, epochs=3)
        return [sorted(plan.global_batch(step)) for step in range(plan.n_steps)]

    assert sets(1) == sets(2) == sets(4)


@settings(max_examples=30, deadline=None)
@given(plans, st.lists(st.integers(0, 30), min_size=1, max_size=6))
def test_any_step_can_be_asked_for_directly(options: dict[str, Any], steps: list[int]) -> None:
    in_order = plan_of(**options, max_steps=31)
    expected = [in_order.step(step) for step in range(31)]
    for step in steps:
        assert plan_of(**options, max_steps=31).step(step) == expected[step]
        assert in_order.step(step) == expected[step]


@pytest.mark.parametrize("group_by", GROUPINGS)
def test_orders_differ_between_epochs_and_seeds(group_by: str) -> None:
    plan = plan_of(64, group_by=group_by, epochs=2, seed=1)
    epochs = [[i for step in range(16) for i in plan.global_batch(16 * epoch + step)] for epoch in (0, 1)]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])
    other = plan_of(64, group_by=group_by, epochs=2, seed=2)
    assert [other.step(step) for step in range(16)] != [plan.step(step) for step in range(16)]


def test_grouping_keeps_modalities_apart_and_micro_batches_even_in_every_epoch() -> None:
    lengths, has_image = shapes(150)
    plan = BatchPlan(
        lengths, has_image, global_batch_size=8, micro_batch_size=2, group_by=GroupBy.modality_length, epochs=4
    )
    mixed = [len({bool(has_image[i]) for i in plan.global_batch(step)}) > 1 for step in range(plan.n_steps)]
    # An epoch's end holds what is left over of both kinds, and what fills it up.
    assert sum(mixed) <= 4 * 3
    spread = BatchPlan(lengths, has_image, global_batch_size=8, micro_batch_size=2, epochs=4)
    unevenness = [
        np.mean([np.ptp([sum(lengths[m]) for m in p.step(step)]) for step in range(p.n_steps)]) for p in (plan, spread)
    ]
    assert unevenness[0] < 0.5 * unevenness[1]


def test_steps_and_epochs() -> None:
    assert plan_of(10, epochs=1).n_steps == 3
    assert plan_of(10, epochs=0.5).n_steps == 2
    assert plan_of(10, epochs=5, max_steps=7).n_steps == 7
    assert plan_of(10).epoch_at(5) == 2.0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"global_batch_size": 5}, "not a multiple"),
        ({"world_size": 3, "global_batch_size": 8}, "not a multiple"),
        ({"micro": 0, "global_batch_size": 4}, "1 or above"),
        ({"world_size": 2, "rank": 2}, "rank 2 of 2"),
        ({"group_by": "size"}, "allowed are"),
    ],
)
def test_sizes_that_cannot_be_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        plan_of(10, **options)


def test_no_samples_is_an_error() -> None:
    with pytest.raises(DataError, match="0 samples"):
        BatchPlan([], [], global_batch_size=1, micro_batch_size=1)


def test_collate_gives_the_official_batch(processor: Any) -> None:
    recorded = json.loads((GOLDEN / "conversations.json").read_text())
    cases = {case["name"]: case for case in recorded["cases"]}
    examples = []
    for row, name in enumerate(recorded["collate"]["rows"]):
        if name in cases:
            case = cases[name]
            encoded = processor.encode(case["conversations"], has_image=case["has_image"])
        else:  # recorded in the batch alone
            length = sum(recorded["collate"]["attention_mask"][row])
            encoded = {key: recorded["collate"][key][row][:length] for key in ("input_ids", "labels")}
        ids, labels = (torch.tensor(encoded[key]) for key in ("input_ids", "labels"))
        examples.append({"id": name, "input_ids": ids, "labels": labels})
    batch = collate(examples, recorded["pad_token_id"], max_length=recorded["model_max_length"])
    for key in ("input_ids", "labels"):
        assert batch[key].tolist() == recorded["collate"][key] and batch[key].dtype == torch.long
    assert batch["attention_mask"].int().tolist() == recorded["collate"]["attention_mask"]
    assert batch["attention_mask"].dtype == torch.bool
    assert batch["ids"] == recorded["collate"]["rows"] and "images" not in batch


def example(i: int) -> dict[str, Any]:
    ids = torch.arange(1, 2 + i % 5)
    return {
        "id": i,
        "input_ids": ids,
        "labels": ids,
        "image": torch.full((3, 2, 2), i),
        "image_aux": torch.zeros(3, 4, 4),
    }


def test_collate_stacks_pixels_and_masks_by_place() -> None:
    rows = [example(3), {**example(0), "input_ids": torch.tensor([0])}]
    batch = collate(rows, 0)
    assert batch["images"].shape == (2, 3, 2, 2) and batch["images_aux"].shape == (2, 3, 4, 4)
    assert batch["attention_mask"].tolist() == [[True] * 4, [True, False, False, False]]
    assert batch["labels"].tolist() == [[1, 2, 3, 4], [1, -100, -100, -100]]


class Numbers:
    """A dataset of numbered examples; reading number 13 fails."""

    def __init__(self, fails_at: int = -1) -> None:
        self.fails_at = fails_at

    def __getitem__(self, i: int) -> dict[str, Any]:
        if i == self.fails_at:
            raise DataError(f"The image of record {i} cannot be read.", advice="Put it back.")
        return example(i)


def steps_of(loader: StepLoader) -> Iterator[list[list[str]]]:
    return ([batch["ids"] for batch in micro_batches] for micro_batches in loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_the_steps_of_its_plan_whatever_the_workers(workers: int) -> None:
    plan = plan_of(23, epochs=2, group_by="length")
    expected = [[[str(i) for i in m] for m in plan.step(step)] for step in range(plan.n_steps)]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert list(steps_of(StepLoader(Numbers(), plan, workers=workers))) == expected
    assert torch.equal(torch.get_rng_state(), state), "dropout masks would depend on the loader"
    resumed = StepLoader(Numbers(), plan, start_step=5, workers=workers)
    assert list(steps_of(resumed)) == expected[5:] and len(resumed) == len(expected) - 5


@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_that_cannot_be_read_stops_the_loader_with_its_name(workers: int) -> None:
    loader = StepLoader(Numbers(fails_at=13), plan_of(23), workers=workers)
    with pytest.raises(DataError, match=r"record 13 cannot be read\. Put it back\.$"):
        list(loader)


def test_ranks_share_the_samples_of_a_step() -> None:
    plans = [plan_of(40, world_size=2, rank=rank, group_by="modality_length") for rank in (0, 1)]
    for steps in zip(*(steps_of(StepLoader(Numbers(), plan)) for plan in plans), strict=True):
        assert max(Counter(name for batches in steps for names in batches for name in names).values()) == 1


def test_a_process_that_still_holds_readers_ends() -> None:
    """No garbage is collected before its end: the loader of an error that is kept lives, and one that is half read."""
    script = """
import gc
gc.disable()
from mgm_exp.errors import DataError
from tests.data_room.test_batches import Numbers, StepLoader, plan_of, pytest
with pytest.raises(DataError) as kept:
    list(StepLoader(Numbers(fails_at=13), plan_of(23), workers=2))
held = iter(StepLoader(Numbers(), plan_of(23), workers=2))
next(held)
print("over", flush=True)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "over\n", "")
