"""The shipped base, with and without LoRA: batches of any mixture say what one question at a time says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mgm_exp.errors import MgmError
from mgm_exp.evaluate import Generator
from mgm_exp.evaluate.answerer import MgmAnswerer
from mgm_exp.evaluate.fitting import Fit
from mgm_exp.evaluate.greedy import greedy
from mgm_exp.model import apply_adapter, load_model, load_processor

TINY = Path(__file__).resolve().parents[2] / "mgm_exp" / "model" / "tiny"
LORA = {"kind": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.1, "target_modules": ["q_proj", "v_proj", "down_proj"]}
QUESTIONS = [
    "what colour is the sign?",
    "describe it",
    "what does the sign read? " * 6,
    "what is the price?",
    "how many are there, and of which colour is the one below?",
    "brand?",
]


@pytest.fixture(scope="module")
def pictures() -> list[Any]:
    """Generated scenes; the last two questions have none, and two share one."""
    import tempfile

    from PIL import Image

    from mgm_exp.data.demo import write_demo

    with tempfile.TemporaryDirectory() as folder:
        write_demo(Path(folder), n_train=0, n_val=0, n_test=3, workers=1)
        found = [Image.open(path).convert("RGB") for path in sorted((Path(folder) / "images").glob("*.png"))]
    return [found[0], found[1], found[0], found[2], None, None]


@pytest.fixture(scope="module", params=["base", "lora"])
def answerer(request: pytest.FixtureRequest) -> MgmAnswerer:
    torch.set_num_threads(1)
    model = load_model(TINY, dtype="float32")
    if request.param == "lora":
        apply_adapter(model, LORA, seed=3)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return MgmAnswerer(model.eval(), load_processor(TINY))


def test_batches_say_what_one_question_at_a_time_says(answerer: MgmAnswerer, pictures: list[Any]) -> None:
    alone = [
        Generator(answerer).answers([q], [p], max_new_tokens=9)[0] for q, p in zip(QUESTIONS, pictures, strict=True)
    ]
    assert len(set(alone)) > 3, "a model that always says the same shows nothing"
    for batch_size in (2, 4, 16):
        generator = Generator(answerer.model, answerer.processor, batch_size=batch_size)
        told: list[tuple[int, int]] = []
        together = generator.answers(
            QUESTIONS, pictures, max_new_tokens=9, on_progress=lambda done, n, told=told: told.append((done, n))
        )
        assert together == alone
        assert told[-1] == (6, 6) and len(told) == -(-6 // batch_size)


def test_a_picture_that_is_asked_about_twice_is_encoded_once(
    answerer: MgmAnswerer, pictures: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Any] = []
    real = answerer.processor.pixels
    monkeypatch.setattr(
        answerer.processor, "pixels", lambda picture, aspect: read.append(picture) or real(picture, aspect)
    )
    Generator(answerer, batch_size=2).answers(QUESTIONS, pictures, max_new_tokens=1)
    assert len(read) == 3


def test_greedy_says_what_transformers_says(answerer: MgmAnswerer, pictures: list[Any]) -> None:
    model, processor = answerer.model, answerer.processor
    seen = answerer.see([answerer.pixels(picture) for picture in pictures[:4]])
    prompts = [processor.encode_prompt(question) for question in QUESTIONS[:4]]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts])
    theirs = model.generate(
        ids, mask, visual_tokens=torch.stack(seen), max_new_tokens=9, eos_token_id=processor.stop_token_ids
    )
    embeds, merged, _ = model.merge(ids, mask, visual_tokens=torch.stack(seen), padding_side="left")
    ours = greedy(model, embeds, merged, max_new_tokens=9, stop_ids=processor.stop_token_ids)
    for row, said in zip(theirs.tolist(), ours, strict=True):
        assert row[: len(said)] == said and set(row[len(said) :]) <= {processor.pad_token_id}


def test_a_row_that_has_ended_costs_nothing_and_the_loop_ends_with_the_last(
    answerer: MgmAnswerer, pictures: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = answerer.model, answerer.processor
    seen = answerer.see([answerer.pixels(picture) for picture in pictures[:4]])
    prompts = [processor.encode_prompt(question) for question in QUESTIONS[:4]]
    said = [
        greedy(model, *_merged(model, [p], [s]), max_new_tokens=9, stop_ids=processor.stop_token_ids)[0]
        for p, s in zip(prompts, seen, strict=True)
    ]
    # Rows end at different places when a token that some of them say becomes one that ends an answer.
    stop = {said[0][2], said[1][4]}
    cut = [next((row[: k + 1] for k, token in enumerate(row) if token in stop), row) for row in said]
    rows: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs.get("input_ids", kwargs.get("inputs_embeds")))), with_kwargs=True
    )
    try:
        found = greedy(model, *_merged(model, prompts, seen), max_new_tokens=9, stop_ids=stop)
    finally:
        hook.remove()
    assert found == cut
    assert len(rows) == max(map(len, cut)), "one forward pass a token, and none after the last"
    assert rows == sorted(rows, reverse=True) and rows[-1] < 4


def _merged(model: Any, prompts: list[list[int]], seen: list[Any]) -> tuple[Any, Any]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts])
    embeds, merged, _ = model.merge(ids, mask, visual_tokens=torch.stack(seen), padding_side="left")
    return embeds, merged


def test_an_image_looks_the_same_in_any_place_of_any_group(answerer: MgmAnswerer, pictures: list[Any]) -> None:
    a, b, c = (answerer.pixels(picture) for picture in (pictures[0], pictures[1], pictures[3]))
    expected = answerer.see([a] * 4)[0]
    for place, group in enumerate(([a, b, c, c], [b, a, c, b], [c, c, a, a], [b, c, b, a])):
        assert torch.equal(answerer.see(group)[place], expected)


def test_what_does_not_fit_is_halved_aloud_and_goes_on_so() -> None:
    asked, said = [], []

    def work(items: Any) -> list[int]:
        asked.append(len(items))
        if len(items) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return [item * 2 for item in items]

    fit = Fit(16, "questions", said.append)
    assert fit.run(list(range(16)), work) == [2 * item for item in range(16)]
    assert asked == [16, 8, 4, *[2] * 8] and fit.size == 2
    assert said[0] == "16 questions at a time do not fit into the GPU's memory (CUDA out of memory): 8 now"
    asked.clear()
    fit.run([1, 2, 3], work)
    assert asked == [2, 1], "what was learnt holds for the next batch"


def test_a_single_question_that_does_not_fit_is_an_error_with_advice() -> None:
    def work(items: Any) -> list[int]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pytest.raises(MgmError, match=r"Not even one of the images .*eval\.precision=bf16"):
        Fit(2, "images", lambda _: None).run([1, 2], work)
