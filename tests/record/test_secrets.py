"""Secrets are masked wherever they stand; what only sounds like one is left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgm_exp.record.secrets import MASK, is_secret_name, redact, redact_text

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "HF_TOKEN", "OPENAI_API_KEY", "MY_SECRET", "DB_PASSWORD"])
def test_values_of_secret_environment_variables_are_masked_everywhere(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "canary-5f3a9c")
    found = redact({"plain": ["say canary-5f3a9c twice: canary-5f3a9c"], "path": Path("/data/canary-5f3a9c/x")})
    assert "canary" not in str(found)
    assert found["plain"] == [f"say {MASK} twice: {MASK}"]


@pytest.mark.parametrize(
    "name",
    ["api_key", "apikey", "tracker.api_key", "WANDB_API_KEY", "token", "hf_token", "access_token"]
    + ["password", "db_password", "secret", "client_secret", "aws_secret_access_key", "private_key", "authorization"],
)
def test_keys_that_hold_secrets_are_recognised(name: str) -> None:
    assert is_secret_name(name)
    assert redact({name: "short"}) == {name: MASK}


@pytest.mark.parametrize(
    "name",
    [
        "use_cls_token",
        "num_memory_tokens",
        "max_new_tokens",
        "tokens",
        "tokens_per_s",
        "ocr_tokens",
        "image_token_index",
    ]
    + ["pad_token", "eos_token", "image_token", "tokenizer", "key", "keys", "cache_visual_tokens", "monkey", "keep"],
)
def test_keys_that_only_sound_secret_are_kept(name: str) -> None:
    assert not is_secret_name(name)
    assert redact({name: "<text>"}) == {name: "<text>"}


def test_values_that_are_not_text_are_kept() -> None:
    values = {"use_cls_token": True, "token": 12, "max_new_tokens": 3, "secret": None, "rate": 0.5}
    assert redact(values) == values


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"--api-key={KEY}", f"--api-key={MASK}"),
        (f'"token": "{KEY}"', f'"token": "{MASK}"'),
        (f"Authorization: Bearer {KEY}", f"Authorization: Bearer {MASK}"),
        ("git clone https://me:pass@host.example/repo", f"git clone https://{MASK}@host.example/repo"),
        ("http://127.0.0.1:8080/path", "http://127.0.0.1:8080/path"),
        ("model hf_abcdefghijklmnopqrstuv", f"model {MASK}"),
        ("123 tokens in 20 s, token: yes", "123 tokens in 20 s, token: yes"),
    ],
)
def test_shapes_of_secrets_in_text(text: str, expected: str) -> None:
    assert redact_text(text) == expected


def test_an_override_with_a_secret_key_loses_its_value() -> None:
    given_overrides = ["+tracker.api_key=abc", "train.lr=1e-4", "--password=x", "eval.textvqa.ocr_tokens=true"]
    expected = [f"+tracker.api_key={MASK}", "train.lr=1e-4", f"--password={MASK}", "eval.textvqa.ocr_tokens=true"]
    assert redact(given_overrides) == expected


def test_short_values_and_folders_of_secret_variables_do_not_eat_ordinary_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LICENSE_KEY", "the")
    monkeypatch.setenv("SSH_KEY", "/home/me/.ssh/id_rsa")
    assert redact_text("the key is in /home/me/.ssh/id_rsa") == "the key is in /home/me/.ssh/id_rsa"


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text("abc XYZ/.-_", max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("xyz_", max_size=6), inner, max_size=4),
    max_leaves=20,
)


@given(PLAIN)
def test_plain_data_without_secrets_is_unchanged(values: object) -> None:
    assert redact(values) == values


@given(PLAIN, st.text("abcdef0123456789", min_size=20, max_size=40))
def test_no_secret_survives_at_any_depth(values: object, secret: str) -> None:
    assert secret not in str(redact({"deep": [values, {"api_key": secret}, f"token={secret}"]}))
