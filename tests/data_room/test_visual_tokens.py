from __future__ import annotations

import json
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mgm_exp.data import VisualTokens, write_visual_tokens
from mgm_exp.errors import DataError

NAMES = [f"{i}.png" for i in range(7)]


def tokens_of(names: list[str], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    seeds = [int(name.split(".")[0]) for name in names]
    return torch.stack([torch.randn(5, 3, generator=torch.Generator().manual_seed(i)) for i in seeds]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_are_read_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    calls: list[list[str]] = []

    def encode(names: list[str]) -> torch.Tensor:
        calls.append(names)
        return tokens_of(names, dtype)

    assert write_visual_tokens([*NAMES, "3.png"], encode, tmp_path, batch_size=3) == 7
    assert [len(names) for names in calls] == [3, 3, 1]
    cached = VisualTokens(tmp_path)
    assert len(cached) == 7 and cached.shape == (7, 5, 3)
    for name in reversed(NAMES):
        assert torch.equal(cached.get(name), tokens_of([name], dtype)[0]) and cached.get(name).dtype == dtype
    assert torch.equal(load_file(tmp_path / "tokens.safetensors")["tokens"], tokens_of(NAMES, dtype))
    assert json.loads((tmp_path / "index.json").read_text())["6.png"] == 6
    zeros = cached.zeros()
    assert zeros.shape == (5, 3) and zeros.dtype == dtype and not zeros.any()


def test_tokens_travel_to_reading_processes(tmp_path: Path) -> None:
    write_visual_tokens(NAMES, tokens_of, tmp_path)
    copied = ForkingPickler.loads(ForkingPickler.dumps(VisualTokens(tmp_path)))
    assert torch.equal(copied.get("4.png"), tokens_of(["4.png"])[0])


def test_an_interrupted_write_leaves_no_complete_folder(tmp_path: Path) -> None:
    def encode(names: list[str]) -> torch.Tensor:
        if "4.png" in names:
            raise KeyboardInterrupt
        return tokens_of(names)

    with pytest.raises(KeyboardInterrupt):
        write_visual_tokens(NAMES, encode, tmp_path, batch_size=2)
    with pytest.raises(DataError, match="holds no visual tokens"):
        VisualTokens(tmp_path)


def test_an_encoder_that_loses_count_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected are \(4, 5, 3\)"):
        write_visual_tokens(NAMES, lambda names: tokens_of(names[:3]), tmp_path, batch_size=4)


def test_no_image_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image to encode"):
        write_visual_tokens([], tokens_of, tmp_path)


def test_damage_is_named(tmp_path: Path) -> None:
    write_visual_tokens(NAMES, tokens_of, tmp_path)
    (tmp_path / "tokens.safetensors").write_bytes(b"short")
    with pytest.raises(DataError, match="cannot be read"):
        VisualTokens(tmp_path)
