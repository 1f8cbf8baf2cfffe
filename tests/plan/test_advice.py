"""What is advised was tried: the overrides of a line make the cell fit, and the cheapest stand first."""

from __future__ import annotations

import pytest

from mgm_exp.plan import cards, plan_cell
from mgm_exp.plan.advice import changes
from tests.plan.settings import config_of

MGM = ("model=mgm_2b", "plan.rows=17500", "plan.align_rows=17500")
COSTS = ("the same result", "equal within rounding", "another experiment")


def settled(overrides: list[str], advised: str) -> list[str]:
    """The command line with the advice taken."""
    keys = {item.split("=")[0] for item in advised.split()}
    return [*(item for item in overrides if item.split("=")[0] not in keys), *advised.split()]


@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter=full", "plan.device=rtx4090"],
        ["adapter=lora_r16", "plan.device=a10", "model.gradient_checkpointing=false", "train.micro_batch_size=16"],
        ["adapter=full", "plan.device=a100_40", "devices=4"],
    ],
    ids=["full", "batch", "sharded"],
)
def test_every_advice_makes_it_fit_with_the_memory_that_it_says(overrides: list[str]) -> None:
    given = [*(item for item in MGM if item.split("=")[0] not in {o.split("=")[0] for o in overrides}), *overrides]
    plan = plan_cell(config_of(*given))
    assert plan.verdict == "does not fit" and plan.advice
    ranks = []
    for line in plan.advice:
        words, _, rest = line.partition(": ")
        other = plan_cell(config_of(*settled(given, words)), with_advice=False)
        assert other.verdict in rest and other.verdict != "does not fit", line
        assert rest.startswith(f"{other.peak_gib:.1f} GiB"), line
        ranks.append(next(k for k, cost in enumerate(COSTS) if cost in rest))
    assert ranks == sorted(ranks)


def test_the_largest_batch_that_fits_is_advised_and_no_smaller_one() -> None:
    sizes = ("train.micro_batch_size=64", "train.align.micro_batch_size=64")
    given = [*MGM, "adapter=lora_r16", "plan.device=rtx4090", *sizes]
    found = plan_cell(config_of(*given)).advice
    batches = [line for line in found if line.startswith("train.micro_batch_size=") and "same result" in line]
    assert len(batches) == 1
    size = int(batches[0].split()[0].split("=")[1])
    larger = settled(given, f"train.micro_batch_size={2 * size} train.align.micro_batch_size={2 * size}")
    assert plan_cell(config_of(*larger), with_advice=False).verdict == "does not fit"


def test_a_shorter_sequence_leaves_room_for_the_image_and_what_is_said_of_it() -> None:
    """2,880 tokens of an image in HD: what is cut to 1,536 has no answer left."""

    def lengths(*overrides: str) -> list[str]:
        tried = [change.put(config_of(*overrides)) for change in changes(config_of(*overrides))]
        return [words.split()[0] for words in tried if "max_length" in words]

    assert lengths("model=mgm_2b_hd") == ["train.max_length=3072"]
    assert lengths("model=mgm_2b") == ["train.max_length=1536", "train.max_length=1024", "train.max_length=768"]
    assert lengths("model=mgm_2b", "plan.text_tokens=600") == ["train.max_length=1536"]


def test_every_kind_of_change_is_tried() -> None:
    config = config_of(*MGM, "adapter=full", "devices=2", "data=blip2")
    kinds = {change.kind for change in changes(config)}
    assert kinds == {
        "batch", "checkpointing", "loss", "zero", "length", "connector", "adapter", "captions", "captioner",
    }  # fmt: skip


def test_without_a_card_nothing_is_offloaded_to_the_memory_that_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "main_memory_gib", lambda: 32.0)
    plan = plan_cell(config_of(*MGM, "adapter=full", "device=cpu"))
    assert plan.verdict == "does not fit" and plan.advice[0].startswith("adapter=lora_r16: ")
    assert not any("offload" in line for line in plan.advice)


def test_nothing_that_helps_is_said_to_help() -> None:
    plan = plan_cell(config_of(*MGM, "adapter=full", "plan.device=a10", "plan.host_memory_gib=0.5"))
    assert plan.verdict == "does not fit"
    assert len(plan.advice) == 1 and "larger card" in plan.advice[0]
