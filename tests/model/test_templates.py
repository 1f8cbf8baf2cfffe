"""Vicuna's and Llama 3's conversations: text, ids and labels against the official definitions, written down directly.

`mgm/train/train.py`: preprocess_v1, preprocess_llama_3 and preprocess_plain; `mgm/conversation.py`: get_prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from llama_folders import write_llama_mgm, write_vicuna_tokenizer
from model_files import edit_json

from mgm_exp.errors import DataError, ModelError
from mgm_exp.model import load_processor
from mgm_exp.model.processor import MGMProcessor, front_image

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA_SYSTEM = (
    "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
LLAMA_USER = "<|start_header_id|>user<|end_header_id|>\n\n"
LLAMA_MODEL = "<|start_header_id|>system<|end_header_id|>\n\n"
LIMIT = 2048


def talk(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


TALKS = {
    "one round": (talk("<image>\nwhat is on the sign?", "an owl"), True),
    "an image at the end": (talk("what is on the sign? <image>", "an owl"), True),
    "three rounds": (talk("<image>\nwhat?", "an owl", "and where?", "USER street, in the US", "sure?", "yes"), True),
    "text only, two rounds": (talk("who are you?", "a model", "really?", "yes"), False),
    "two images in a turn": (talk("<image> and <image>", "the same"), True),
    "begins with an answer": ([{"from": "gpt", "value": "hello"}, *talk("<image>\nwhat?", "an owl")], True),
    "ends with a question": (talk("<image>\nwhat?", "an owl", "and?"), True),
    "an empty answer": (talk("<image>\nwhat?", ""), True),
    "an empty answer, then another": (talk("<image>\nwhat?", "", "really?", "yes"), True),
    "a mark in the question": (talk("<image>\nsay ASSISTANT: now", "no"), True),
    "an end in the answer": (talk("<image>\nwhat?", "an</s>owl<|eot_id|>!"), True),
    "blanks around": (talk("<image>\n  what?  ", "  an owl  "), True),
    "words of any script": (talk("<image>\nwas heißt 出口?", "выход 🦉"), True),
}


def image_tokens(tokenizer: Callable, text: str) -> list[int]:
    """tokenizer_image_token: parts around an image by themselves, <bos> once."""
    chunks = [tokenizer(part).input_ids for part in text.split("<image>")]
    ids = list(chunks[0][:1])
    for number, chunk in enumerate(chunks):
        ids += [-200] * (number > 0) + chunk[1:]
    return ids


def prepared(turns: Sequence[dict[str, str]], has_image: bool) -> list[str]:
    turns = turns if turns[0]["from"] == "human" else turns[1:]
    return [front_image(turn["value"]) if has_image else turn["value"] for turn in turns]


def vicuna_text(values: Sequence[str]) -> str:
    text = VICUNA_SYSTEM + " "
    for i, value in enumerate(values):
        role, end = (("USER", " "), ("ASSISTANT", "</s>"))[i % 2]
        text += f"{role}: {value}{end}" if value else f"{role}:"
    return text


def llama_text(values: Sequence[str]) -> str:
    text = LLAMA_SYSTEM + "<|eot_id|>"
    for i, value in enumerate(values):
        role = (LLAMA_USER, LLAMA_MODEL)[i % 2]
        text += f"{role}{value}<|eot_id|>" if value else role
    return text


def vicuna_labels(tokenizer: Callable, text: str, ids: list[int], count: Callable[[str], int], legacy: bool):
    """preprocess_v1."""
    labels = list(ids)
    total = sum(i != tokenizer.pad_token_id for i in ids)
    labels[:1] = [-100]
    place = 1
    for number, part in enumerate(text.split("</s>")):
        if part == "":
            break
        halves = part.split(" ASSISTANT: ")
        if len(halves) != 2:
            break
        whole, asked = count(part), count(halves[0] + " ASSISTANT: ") - 2
        if number != 0 and not legacy:
            whole, asked = whole - 1, asked - 1
        labels[place : place + asked] = [-100] * len(labels[place : place + asked])
        place += whole
    labels[place:] = [-100] * len(labels[place:])
    return [-100] * len(ids) if place < LIMIT and place != total else labels


def llama_labels(tokenizer: Callable, text: str, ids: list[int], count: Callable[[str], int]):
    """preprocess_llama_3."""
    labels = list(ids)
    total = sum(i != tokenizer.pad_token_id for i in ids)
    pieces = text.split("<|eot_id|>")
    rounds = ["<|eot_id|>".join(pieces[:3])]
    rounds += ["<|eot_id|>".join(pieces[i : i + 2]) for i in range(3, len(pieces), 2)]
    labels[:1] = [-100]
    place = 1
    for part in rounds:
        if part == "":
            break
        halves = part.split("<|eot_id|>" + LLAMA_MODEL)
        if len(halves) != 2:
            break
        whole = count(part) - 1 + 1
        asked = count(halves[0] + "<|eot_id|>" + LLAMA_MODEL) - 2 + 1
        labels[place : place + asked] = [-100] * len(labels[place : place + asked])
        place += whole
    labels[place:] = [-100] * len(labels[place:])
    return [-100] * len(ids) if place < LIMIT and place != total else labels


@pytest.fixture(scope="module", params=["vicuna", "vicuna legacy", "llama_3"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_llama_mgm(tmp_path_factory.mktemp("mgm"), kind.split()[0])
    if kind == "vicuna legacy":
        write_vicuna_tokenizer(folder, legacy=None)  # what a tokenizer_config.json without the word means
    return folder


@pytest.fixture(scope="module")
def processor(folder: Path) -> MGMProcessor:
    return load_processor(folder, LIMIT)


@pytest.mark.parametrize("name", TALKS)
def test_text_ids_and_labels_are_those_of_the_official_definitions(kind: str, processor, name: str) -> None:
    turns, has_image = TALKS[name]
    tokenizer = processor.tokenizer

    def tokens(text: str) -> list[int]:
        return image_tokens(tokenizer, text) if has_image else tokenizer(text).input_ids

    def count(text: str) -> int:
        return len(tokens(text))

    values = prepared(turns, has_image)
    text = llama_text(values) if kind == "llama_3" else vicuna_text(values)
    ids = tokens(text)
    assert processor.prompt(turns, has_image) == text
    encoded = processor.encode(turns, has_image)
    assert encoded["input_ids"] == ids
    if kind == "llama_3":
        assert encoded["labels"] == llama_labels(tokenizer, text, ids, count)
    else:
        assert encoded["labels"] == vicuna_labels(tokenizer, text, ids, count, legacy=kind.endswith("legacy"))


def test_answers_and_their_ends_are_learnt_and_nothing_else(kind: str, processor) -> None:
    turns, _ = TALKS["three rounds"]
    encoded = processor.encode(turns)
    learnt = processor.tokenizer.decode([i for i in encoded["labels"] if i != -100])
    end = "<|eot_id|>" if kind == "llama_3" else "</s>"
    assert learnt.replace(" ", "") == f"an owl{end}USER street, in the US{end}yes{end}".replace(" ", "")


def test_a_question_ends_where_the_answer_begins(kind: str, processor) -> None:
    text = (llama_text if kind == "llama_3" else vicuna_text)(["<image>\nwhat?", ""])
    assert text.endswith(LLAMA_MODEL if kind == "llama_3" else " ASSISTANT:")
    assert processor.encode_prompt("what?") == image_tokens(processor.tokenizer, text)
    asked = processor.encode_prompt("what?")
    trained = processor.encode(talk("<image>\nwhat?", "yes"))
    assert trained["input_ids"][: len(asked)] == asked
    assert [label != -100 for label in trained["labels"]].index(True) == len(asked)


def test_stage_1_of_vicuna_is_the_image_and_its_caption(kind: str, folder: Path) -> None:
    processor = load_processor(folder, LIMIT, stage="align")
    turns = talk("<image>\ndescribe it", "an owl")
    if kind == "llama_3":
        assert processor.prompt(turns) == llama_text(["<image>\ndescribe it", "an owl"])
        return
    encoded = processor.encode(turns)
    assert encoded["input_ids"] == image_tokens(processor.tokenizer, "<image>an owl\n")
    assert encoded["labels"] == [-100, -100, *encoded["input_ids"][2:]]
    assert processor.encode_prompt("what?") == load_processor(folder, LIMIT).encode_prompt("what?")
    for other in (talk("describe it", "an owl"), talk("<image>", "a", "b", "c")):  # the original asserts
        assert set(processor.encode(other)["labels"]) <= {-100}


def test_the_padding_token_is_the_unknown_one_as_the_official_training_sets_it(kind: str, processor) -> None:
    token = "<|reserved_special_token_0|>" if kind == "llama_3" else "<unk>"
    assert processor.tokenizer.pad_token == processor.tokenizer.unk_token == token
    assert processor.tokenizer.convert_ids_to_tokens(processor.pad_token_id) == token


def test_what_was_written_comes_back_as_text(processor) -> None:
    for answer in ("an owl, in the US", "出口 🦉"):
        labels = processor.encode(talk("<image>\nwhat?", answer))["labels"]
        assert processor.decode([i for i in labels if i != -100]) == answer


def test_turns_that_do_not_alternate_are_named(processor) -> None:
    with pytest.raises(DataError, match="Turn 2 of a conversation is from 'human'"):
        processor.encode([*talk("a")] * 2)


def test_a_tokenizer_of_no_template_is_refused(tmp_path: Path) -> None:
    folder = write_llama_mgm(tmp_path, "llama_3")
    for file in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        file.write_text(file.read_text().replace("<|eot_id|>", "<|other|>"))
    with pytest.raises(ModelError, match="belongs to none of the templates of MGM on llama: llama_3, vicuna_v1"):
        load_processor(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json and no tokenizer\.model"):
        load_processor(folder)


def test_a_damaged_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    folder = write_llama_mgm(tmp_path)
    (folder / "tokenizer.model").write_bytes(b"\xff\xffno protobuf")
    with pytest.raises(ModelError, match=r"tokenizer\.model is damaged"):
        load_processor(folder)
    write_vicuna_tokenizer(folder)
    edit_json(folder / "tokenizer_config.json", added_tokens_decoder={"1": {"content": "<s>"}, "376": "<extra>"})
    assert load_processor(folder).tokenizer.convert_tokens_to_ids(["<s>", "<extra>"]) == [1, 376]
