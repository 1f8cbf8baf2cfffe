"""The tiny base's tokenizer: known words whole, everything else spelt, any text given back."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgm_exp.data.demo.captions import raw_caption
from mgm_exp.data.demo.questions import questions_of
from mgm_exp.data.demo.scenes import BRANDS, SIGN_WORDS, sample_scene, scene_stream
from mgm_exp.train.tiny.conversations import all_requests, base_rounds
from mgm_exp.train.tiny.tokenizer import SPECIAL_TOKENS, has_only_known_words, make_tokenizer, save_tokenizer

TOKENIZER = make_tokenizer()


def test_special_tokens_have_gemma_order() -> None:
    assert [TOKENIZER.token_to_id(t) for t in SPECIAL_TOKENS] == list(range(7))
    assert TOKENIZER.encode("OPEN").ids[0] == TOKENIZER.token_to_id("<bos>")


@pytest.mark.parametrize("word", [*SIGN_WORDS, *BRANDS])
def test_demo_word_is_one_token_at_the_start_and_after_a_blank(word: str) -> None:
    alone = TOKENIZER.encode(word, add_special_tokens=False).ids
    after = TOKENIZER.encode(f"a sign {word}", add_special_tokens=False).ids
    assert len(alone) == 1 and after[-1] == alone[0]


def test_numbers_prices_and_unknown_words_are_spelt() -> None:
    assert TOKENIZER.encode("$5.9", add_special_tokens=False).tokens == ["$", "5", ".", "9"]
    assert TOKENIZER.encode("XQZ", add_special_tokens=False).tokens == ["X", "Q", "Z"]
    assert TOKENIZER.encode("frog", add_special_tokens=False).tokens == list("frog")


@given(st.text(alphabet=st.characters(blacklist_characters="▁", blacklist_categories=["Cs"]), max_size=40))
@settings(max_examples=60, deadline=None)
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
    assert TOKENIZER.token_to_id("<unk>") not in ids


def test_auto_tokenizer_loads_the_folder_with_equal_ids(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(TOKENIZER, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.bos_token_id, loaded.unk_token_id) == (0, 1, 2, 3)
    for text in (
        "\nwhat is the price on the tag?<end_of_turn>\n<start_of_turn>model\n$5.9<end_of_turn>\n<eos>",
        "OPEN a ü",
    ):
        assert loaded(text).input_ids == TOKENIZER.encode(text).ids
    ids = loaded("OPEN<end_of_turn>\n<eos>").input_ids
    assert loaded.decode(ids, skip_special_tokens=True).strip() == "OPEN"


def test_no_demo_question_is_worded_like_base_training() -> None:
    base = all_requests()
    for index in range(200):
        scene = sample_scene(0, "test", index)
        for question in questions_of(scene):
            assert question.question not in base and question.question.rstrip("?") not in base
            assert has_only_known_words(question.question)
        assert has_only_known_words(raw_caption(scene, scene_stream(0, "x", index)))


def test_all_requests_covers_what_base_training_asks() -> None:
    base = all_requests()
    for index in range(200):
        scene = sample_scene(0, "pretrain", index, random_share=0.5)
        for made in base_rounds(scene, scene_stream(0, "y", index), 5):
            request = "which object carries *" if made.request.startswith("which object") else made.request
            assert request in base
            assert has_only_known_words(made.request) and has_only_known_words(made.answer)
