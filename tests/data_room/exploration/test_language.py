"""Guesses at languages, and token counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mgm_exp.data.exploration.language import guess_languages
from mgm_exp.data.exploration.token_lengths import TokenCounter, model_max_length, tokenizer_file
from mgm_exp.data.exploration.tokens import token_stream
from mgm_exp.errors import ModelError

ENGLISH = ["a red sign above the door", "the label of a bottle", "a man in a blue shirt with his dog"]


@pytest.mark.parametrize(
    ("caption", "language"),
    [
        ("a cat on the table", "English"),
        ("ein Schild mit der Aufschrift", "German"),
        ("une femme dans la rue", "French"),
        ("el perro con los niños en la calle", "Spanish"),
        ("一个红色的标志", "Chinese characters"),
        ("猫がテーブルの上にいる", "Japanese"),
        ("красный знак", "Cyrillic script"),
        ("lion king cartoon", "undecided"),
        ("die hard trilogy", "undecided"),
        ("2013 $5 !!!", "undecided"),
        ("", "undecided"),
    ],
)
def test_a_caption_has_the_language_that_its_words_speak_for(caption: str, language: str) -> None:
    places, names = guess_languages(token_stream([*ENGLISH, caption]))
    assert names[int(places[-1])] == language
    assert [names[place] for place in places[:3].tolist()] == ["English"] * 3


def test_tokens_are_those_of_the_tokenizer() -> None:
    from tokenizers import Tokenizer

    import mgm_exp

    folder = Path(mgm_exp.__file__).parent / "model" / "tiny"
    file = tokenizer_file(folder)
    plain = Tokenizer.from_file(str(file))
    captions = ["a red sign", "", "$5.99 & more", "日本語"]
    expected = [len(plain.encode(caption, add_special_tokens=False).ids) for caption in captions]
    assert TokenCounter(file)(captions).tolist() == expected
    assert model_max_length(folder) == 512


def test_a_length_without_limit_is_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 10**30}), encoding="utf-8")
    assert model_max_length(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({"tokenizer_model_max_length": 77}), encoding="utf-8")
    assert model_max_length(tmp_path) == 77


def test_a_folder_without_a_tokenizer_and_a_damaged_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no tokenizer"):
        tokenizer_file(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="cannot be loaded"):
        TokenCounter(tmp_path / "tokenizer.json")(["a"])
