"""A safetensors file that is written one tensor at a time is the one that the library reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from mgm_exp.model.tensor_stream import stream_tensors

SHAPES = st.dictionaries(
    st.text(min_size=1, max_size=6).filter(lambda name: name != "__metadata__" and name.isprintable()),
    st.lists(st.integers(1, 5), max_size=3).map(tuple),
    min_size=1,
    max_size=5,
)


@settings(max_examples=40, deadline=None)
@given(shapes=SHAPES, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), seed=st.integers(0, 99))
def test_what_was_written_is_read_back_bit_for_bit(tmp_path_factory, shapes, dtype, seed) -> None:
    path = tmp_path_factory.mktemp("stream") / "t.safetensors"
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    size = stream_tensors(path, shapes, dtype, reversed(list(tensors.items())))
    found = load_file(str(path))
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert size == sum(t.numel() * t.element_size() for t in tensors.values())


@pytest.mark.parametrize(
    "given",
    [[], [("a", torch.zeros(3))], [("a", torch.zeros(2).half())], [("a", torch.zeros(2)), ("b", torch.zeros(2))]],
)
def test_what_was_not_said_leaves_no_file(tmp_path: Path, given: list[tuple[str, torch.Tensor]]) -> None:
    with pytest.raises(ValueError, match="not"):
        stream_tensors(tmp_path / "t.safetensors", {"a": (2,)}, torch.float32, given)
    assert list(tmp_path.iterdir()) == []
