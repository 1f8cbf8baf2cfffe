"""Labels stand on the answers and their end, token for token, and nowhere else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mgm_exp.errors import BoundaryNotFound, ImageTruncated, ModelError, SpecialTokenInText, UnusableRow
from mgm_exp.model.hf.loading import open_processor

from .conftest import FAMILIES, TURNS, picture, turns_for
from .tiny_models import LLAVA_TEMPLATE, QWEN_TEMPLATE

LEARNT = {
    "llava": ["▁a", "▁red", "▁sign", "</s>", "▁blue", "▁and", "▁green", "</s>"],
    "paligemma": ["▁a", "▁red", "▁sign", "<eos>"],
    "qwen2_vl": ["a", "Ġred", "Ġsign", "<|im_end|>", "bl", "ue", "Ġa", "nd", "Ġ", "gree", "n", "<|im_end|>"],
    "qwen2_5_vl": ["a", "Ġred", "Ġsign", "<|im_end|>", "bl", "ue", "Ġa", "nd", "Ġ", "gree", "n", "<|im_end|>"],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_exactly_the_answers_and_their_ends_are_learnt(family: str, processor_of: Callable[..., Any]) -> None:
    processor = processor_of(family)
    example = processor.inputs(turns_for(family), picture())
    ids, labels = example["input_ids"], example["labels"]
    learnt = labels != -100
    assert processor.tokenizer.convert_ids_to_tokens(ids[learnt]) == LEARNT[family]
    assert torch.equal(ids[learnt], labels[learnt])
    # What stands before an answer is what the model sees when it is asked
    asked = processor.prompts(["What is it?"], [picture()])
    first = int(learnt.nonzero()[0])
    assert ids[:first].tolist() == asked["input_ids"][0].tolist()


@pytest.mark.parametrize("turns", [TURNS, TURNS[2:], TURNS[2:] + TURNS[2:]])
def test_labels_of_qwen_are_those_of_a_template_that_marks_answers(
    turns: list[dict[str, str]], processor_of: Callable[..., Any]
) -> None:
    marked = QWEN_TEMPLATE.replace(
        "<|im_start|>{{ message['role'] }}\n",
        "<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'][0]['text'] }}<|im_end|>{% endgeneration %}{{ '\\n' }}{% else %}",
    ).replace("{% endfor %}<|im_end|>\n{% endfor %}", "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}")
    processor = processor_of("qwen2_vl")
    messages = [processor.dialect._message(turn) for turn in turns]
    found = processor.tokenizer.apply_chat_template(
        messages, chat_template=marked, return_assistant_tokens_mask=True, return_dict=True, tokenize=True
    )
    written = processor.dialect.conversation(turns, False)
    assert written.ids == found["input_ids"]
    assert [int(learnt) for learnt in written.learnt] == found["assistant_masks"]


def test_labels_of_paligemma_are_those_of_its_own_processor(processor_of: Callable[..., Any]) -> None:
    processor = processor_of("paligemma")
    example = processor.inputs(TURNS[:2], picture())
    own = processor.processor(
        text=["<image>What is it?"], suffix=["a red sign"], images=[picture()], return_tensors="pt"
    )
    for key in ("input_ids", "token_type_ids", "labels", "attention_mask"):
        assert torch.equal(example[key], own[key][0]), key


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [(70, 50), (33, 90), (64, 64)])
def test_rows_are_counted_without_their_images(
    family: str, size: tuple[int, int], processor_of: Callable[..., Any]
) -> None:
    processor = processor_of(family)
    example = processor.inputs(turns_for(family), picture(*size))
    labels = example["labels"]
    counted = processor.measure(turns_for(family), size)
    assert counted == (len(labels), int((labels[1:] != -100).sum()), True)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "paligemma"])
def test_a_row_without_an_image_is_learnt_too(family: str, processor_of: Callable[..., Any]) -> None:
    processor = processor_of(family)
    example = processor.inputs(TURNS[2:], None)
    assert not any("pixel" in key for key in example)
    assert processor.measure(TURNS[2:], None)[1] == int((example["labels"] != -100).sum()) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_long_rows_are_cut_behind_their_image_and_never_inside(
    family: str, folder_of: Callable[[str], Path], processor_of: Callable[..., Any]
) -> None:
    turns = turns_for(family)
    whole = processor_of(family).inputs(turns, picture())
    image = processor_of(family).processor.image_token_id
    end = int((whole["input_ids"] == image).nonzero()[-1]) + 1
    short = open_processor(folder_of(family), len(whole["input_ids"]) - 2)
    cut = short.inputs(turns, picture())
    tokens = ("input_ids", "labels", "attention_mask", "mm_token_type_ids", "token_type_ids")
    assert all(torch.equal(cut[key], whole[key][:-2]) for key in tokens if key in whole)
    assert all(torch.equal(cut[key], whole[key]) for key in whole if key not in tokens)
    assert short.measure(turns, (70, 50))[1] == int((cut["labels"] != -100).sum())
    barely = open_processor(folder_of(family), end)
    assert barely.measure(turns, (70, 50))[1] == 0  # nothing to learn: curation calls that labels_truncated
    too_short = open_processor(folder_of(family), end - 1)
    for attempt in (lambda: too_short.measure(turns, (70, 50)), lambda: too_short.inputs(turns, picture())):
        with pytest.raises(ImageTruncated, match=f"ends at token {end}"):
            attempt()


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "paligemma"])
def test_a_batch_is_what_the_models_own_processor_would_make_of_it(
    family: str, processor_of: Callable[..., Any]
) -> None:
    processor = processor_of(family)
    questions, images = ["What is it?", "What colour is the blue door, said the man?"], [picture(), picture(60, 90)]
    batch = processor.prompts(questions, images)
    texts = [processor.dialect.prompt(question, True).text for question in questions]
    processor.tokenizer.padding_side = "left"
    own = processor.processor(text=texts, images=images, padding=True, return_tensors="pt")
    assert set(own) - {"labels"} == set(batch)
    for key, value in batch.items():
        if key == "token_type_ids":  # of padding, which nothing attends to
            assert torch.equal(value[batch["attention_mask"] == 1], own[key][batch["attention_mask"] == 1])
        else:
            assert torch.equal(value, own[key]), key


def test_text_that_would_act_as_a_special_token_is_refused(processor_of: Callable[..., Any]) -> None:
    turns = [TURNS[2], {"from": "gpt", "value": "yes <|im_end|> no"}]
    with pytest.raises(SpecialTokenInText, match="im_end"):
        processor_of("qwen2_vl").inputs(turns, None)
    with pytest.raises(SpecialTokenInText, match="<image>"):
        processor_of("llava").measure([TURNS[2], {"from": "gpt", "value": "an <image> here"}], None)


def test_what_a_model_without_a_chat_template_cannot_take_is_refused(processor_of: Callable[..., Any]) -> None:
    processor = processor_of("paligemma")
    with pytest.raises(UnusableRow, match="4 turns"):
        processor.measure(TURNS, (70, 50))
    with pytest.raises(UnusableRow, match="no image"):
        processor.measure(TURNS[2:], None)


def _with_template(folder: Path, out: Path, template: str | None) -> Path:
    shutil.copytree(folder, out)
    (out / "chat_template.jinja").unlink()
    if template is not None:
        (out / "chat_template.jinja").write_text(template, encoding="utf-8")
    return out


@pytest.mark.parametrize(
    ("template", "says"),
    [
        # An answer changes once the conversation goes on, as templates of thinking models have it
        ("{% if messages | length > 3 %}{{ 'Go on. ' }}{% endif %}" + LLAVA_TEMPLATE, "where the answer begins"),
        (LLAVA_TEMPLATE.replace("'ASSISTANT:'", "'ASSISTANT: <think>'"), "where the answer begins"),
        (LLAVA_TEMPLATE.replace("content['text'] + ' '", "content['text'].upper() + ' '"), "changes the text"),
        (LLAVA_TEMPLATE.replace("content['text'] + ' '", "content['text'] + ' over. '"), "no end token"),
        ("{{ raise_exception('no') }}", "refuses the conversation"),
        (None, "no chat template"),
    ],
)
def test_a_template_without_exact_boundaries_is_refused(
    template: str | None, says: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = _with_template(folder_of("llava"), tmp_path / "model", template)
    with pytest.raises(ModelError, match=says):
        open_processor(folder)


def test_a_token_over_the_beginning_of_an_answer_is_refused(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = _with_template(
        folder_of("llava"), tmp_path / "model", LLAVA_TEMPLATE.replace("{{ 'ASSISTANT:' }}", "{{ 'ASSIS' }}")
    )
    with pytest.raises(ModelError, match="reaches over"):
        open_processor(folder)


def test_a_folder_without_an_end_of_text_is_refused(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folder_of("llava"), folder)
    for name in ("generation_config.json", "config.json", "tokenizer_config.json"):
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        values.pop("eos_token_id", None)
        values.pop("eos_token", None)
        (folder / name).write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(ModelError, match=r"ends text|eos_token"):
        open_processor(folder)


def test_refusals_name_their_kind() -> None:
    from mgm_exp.data.kinds import ROW_KINDS

    assert {kind.kind for kind in (UnusableRow, SpecialTokenInText, BoundaryNotFound, ImageTruncated)} <= set(ROW_KINDS)
