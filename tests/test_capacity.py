"""What is predicted not to fit is refused before it starts, and says what would fit; or it is forced."""

from __future__ import annotations

from pathlib import Path

import pytest

from mgm_exp.campaign import constraints_of
from mgm_exp.capacity import memory_limit_gib, refuse_cell, refuse_what_does_not_fit
from mgm_exp.command import main
from mgm_exp.compose import compose
from mgm_exp.config import Card
from mgm_exp.errors import DoesNotFit

FULL = ("model=mgm_2b", "adapter=full")


def test_a_cell_that_does_not_fit_on_the_named_card_is_refused_with_what_would_fit() -> None:
    with pytest.raises(DoesNotFit, match=r"does not fit in RTX 4090.*adapter=lora_r16.*plan\.refuse=false") as caught:
        refuse_cell(compose([*FULL, "plan.device=rtx4090"]))
    assert caught.value.exit_code == 3
    for allowed in (
        ["plan.device=h200"],
        [],  # no card was named
        ["plan.device=rtx4090", "plan.refuse=false"],
        ["plan.device=rtx4090", "train.auto_micro_batch=true"],  # it makes itself smaller
        ["plan.device=rtx4090", "device=cpu"],
    ):
        refuse_cell(compose([*FULL, *allowed]))


def test_what_is_refused_is_said_to_lack_what_it_lacks() -> None:
    """Not the benchmark whose batch comes down by itself, and main memory where that is what ends."""
    card = "plan.device=rtx4090"
    with pytest.raises(DoesNotFit, match=r"the instruct stage needs 4\d\.\d GiB for tensors") as caught:
        refuse_cell(compose([*FULL, card, "eval.textvqa.batch_size=2048"]))
    assert "evaluate[" not in str(caught.value) and "adapter=lora_r16: 12." in str(caught.value)
    with pytest.raises(DoesNotFit, match=r"main memory: \d+\.\d GiB are needed, plan\.host_memory_gib=3") as caught:
        refuse_cell(compose(["model=mgm_2b", "adapter=lora_r8", card, "plan.host_memory_gib=3"]))
    assert "for tensors" not in str(caught.value)


def test_a_grid_none_of_whose_cells_fits_ends_with_3_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-m", "model=mgm_2b", "adapter=full", "seed=0,1", "plan.device=rtx3090", f"paths.root={tmp_path}"]
    assert main(arguments) == 3
    assert "None of the 2 cells can be run" in capsys.readouterr().err
    assert not (tmp_path / "sweeps").exists()


def test_a_search_takes_the_cards_memory_as_a_constraint() -> None:
    config = compose([*FULL, "plan.device=rtx3090", "sweep.constraints=['adapter.rank<9']"])
    assert constraints_of(config) == ["adapter.rank<9", f"predicted_memory_gib <= {memory_limit_gib(config):g}"]
    config.plan.device = Card.auto
    assert constraints_of(config) == ["adapter.rank<9"]


def test_a_run_is_held_against_its_own_gpu_and_never_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from mgm_exp.plan import cell
    from mgm_exp.plan.cards import Device

    assert refuse_what_does_not_fit(compose(FULL), "cpu") == ""
    # No GPU is here: the card that torch would report
    monkeypatch.setattr(cell, "device_of", lambda card, is_cpu: Device("Card X", 24.0, None))
    with pytest.raises(DoesNotFit, match="Card X"):
        refuse_what_does_not_fit(compose(FULL), "cuda")
    assert refuse_what_does_not_fit(compose([*FULL, "plan.refuse=false"]), "cuda") == ""
    note = refuse_what_does_not_fit(compose(["model=mgm_2b", "train.micro_batch_size=1"]), "cuda")
    assert "GiB predicted, fits in Card X" in note
