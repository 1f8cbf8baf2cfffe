"""Batched generation with a KV cache gives what one prompt at a time gives."""

from __future__ import annotations

import pytest
import torch

from mgm_exp.model import apply_adapter


@pytest.fixture(scope="module")
def prompts(golden):
    """Four questions of different lengths about four random images, as (ids, images, images_aux)."""
    torch.manual_seed(3)
    ids = [
        [2, 5, 759, 263, -200, 263, *torch.randint(7, 900, (n,)).tolist(), 6, 263, 5, 865, 263] for n in (3, 9, 1, 6)
    ]
    return ids, torch.randn(4, 3, 56, 56), torch.randn(4, 3, 128, 128)


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
    return ids, mask


def test_batched_answers_equal_single_answers(still_model, prompts) -> None:
    rows, images, images_aux = prompts
    ids, mask = padded(rows)
    together = still_model.generate(ids, mask, images=images, images_aux=images_aux, max_new_tokens=10)
    assert together.shape == (4, 10)
    for i, row in enumerate(rows):
        alone = still_model.generate(
            torch.tensor([row]), images=images[i : i + 1], images_aux=images_aux[i : i + 1], max_new_tokens=10
        )
        assert alone[0].tolist() == together[i, : alone.shape[1]].tolist()


def test_cached_generation_equals_the_argmax_of_growing_forward_passes(still_model, prompts) -> None:
    rows, images, images_aux = prompts
    answer = still_model.generate(
        torch.tensor(rows[:1]), images=images[:1], images_aux=images_aux[:1], max_new_tokens=6, eos_token_id=[999]
    )
    ids = torch.tensor(rows[:1])
    for token in answer[0].tolist():
        with torch.no_grad():
            logits = still_model(ids, images=images[:1], images_aux=images_aux[:1]).logits
        assert int(logits[0, -1].argmax()) == token
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_a_row_stops_at_its_stop_token_and_is_filled_with_padding(still_model, prompts) -> None:
    rows, images, images_aux = prompts
    ids, mask = padded(rows)
    kwargs = {"images": images, "images_aux": images_aux, "max_new_tokens": 6}
    free = still_model.generate(ids, mask, eos_token_id=[999], **kwargs)
    stop = int(free[0, 1])
    stopped = still_model.generate(ids, mask, eos_token_id=[999, stop], **kwargs)
    first = free[0].tolist().index(stop)
    assert stopped[0, : first + 1].tolist() == free[0, : first + 1].tolist()
    assert stopped[0, first + 1 :].tolist() == [0] * (stopped.shape[1] - first - 1)


def test_stop_tokens_default_to_end_of_sequence_and_end_of_turn(still_model) -> None:
    assert still_model.generation_config.eos_token_id == [1, 6]


def test_cached_visual_tokens_give_the_same_answers(still_model, prompts) -> None:
    rows, images, images_aux = prompts
    ids, mask = padded(rows)
    with torch.no_grad():
        tokens = still_model.model.encode_images(images, images_aux)
    a = still_model.generate(ids, mask, images=images, images_aux=images_aux, max_new_tokens=5)
    assert torch.equal(a, still_model.generate(ids, mask, visual_tokens=tokens, max_new_tokens=5))


def test_the_towers_run_once_for_a_whole_answer(still_model, prompts) -> None:
    rows, images, images_aux = prompts
    calls: list[int] = []
    hook = still_model.model.vision_tower_aux.register_forward_hook(lambda *_: calls.append(1))
    still_model.generate(torch.tensor(rows[:1]), images=images[:1], images_aux=images_aux[:1], max_new_tokens=5)
    hook.remove()
    assert len(calls) == 1


def test_a_question_without_an_image_is_answered(still_model) -> None:
    assert still_model.generate(torch.tensor([[2, 5, 759, 263, 94, 6]]), max_new_tokens=3).shape[0] == 1


def test_a_model_in_training_generates_with_its_adapter(model, prompts, lora) -> None:
    rows, images, images_aux = prompts
    kwargs = {"images": images[:1], "images_aux": images_aux[:1], "max_new_tokens": 4, "eos_token_id": [999]}
    before = model.generate(torch.tensor(rows[:1]), **kwargs)
    apply_adapter(model, lora, seed=0)
    assert torch.equal(model.generate(torch.tensor(rows[:1]), **kwargs), before)  # B = 0: nothing changed yet
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    changed = model.generate(torch.tensor(rows[:1]), **kwargs)
    assert not torch.equal(changed, before)
    model.enable_gradient_checkpointing()
    model.train()
    assert torch.equal(model.generate(torch.tensor(rows[:1]), **kwargs), changed)
    assert model.training
