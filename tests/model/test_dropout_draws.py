"""Dropout's random numbers: bit for bit those of torch, and the generator after them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mgm_exp.model import dropout_draws
from mgm_exp.model.padding_free import Padding

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
RATES = st.one_of(
    st.floats(0, 1),
    st.sampled_from([0.0, 5e-324, 1e-17, 2.0**-53, 0.05, 0.1, 0.5, 1 - 2.0**-53, 1.0]),
)


@pytest.fixture(scope="module", autouse=True)
def _however_few() -> Iterator[None]:
    """Whatever the number of elements, it is drawn here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dropout_draws, "SMALLEST", 1)
        patch.setattr(dropout_draws, "AT_ONCE", 512)
        dropout_draws._agrees.cache_clear()
        yield
    dropout_draws._agrees.cache_clear()


def outcome(drop: Callable[[Tensor, float], Tensor], x: Tensor, rate: float, seed: int, skipped: int) -> list[Tensor]:
    """Values, gradient, and torch's generator afterwards, from the state that ``skipped`` small draws leave."""
    torch.manual_seed(seed)
    torch.randn(1)  # leaves a second normal sample waiting
    torch.empty(skipped, dtype=torch.int32).random_()
    x = x.clone().requires_grad_()
    dropped = drop(x, rate)
    dropped.backward(torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x))
    assert x.grad is not None
    return [dropped.detach(), x.grad, torch.get_rng_state(), torch.randn(3)]


def as_bits(tensor: Tensor) -> bytes:
    """So that -0.0 is not 0.0."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in expected]
    assert list(map(as_bits, found)) == list(map(as_bits, expected))


def test_this_torch_draws_as_it_is_known_to() -> None:
    assert all(map(dropout_draws._agrees, DTYPES)), "nothing is faster here, and what follows tests nothing"


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    times=st.sampled_from([1, 1, 1, 7]),
    rate=RATES,
    seed=st.integers(0, 2**32),
    skipped=st.integers(0, 1300),
    dtype=st.sampled_from(DTYPES),
)
def test_it_is_torchs_dropout_from_any_state_on(
    shape: list[int], times: int, rate: float, seed: int, skipped: int, dtype: torch.dtype
) -> None:
    shape[-1] *= times
    x = torch.linspace(-2, 2, torch.Size(shape).numel()).to(dtype).view(shape)
    found, expected = (outcome(drop, x, rate, seed, skipped) for drop in (dropout_draws.dropout, F.dropout))
    assert_same_bits(found, expected)


def test_a_factor_that_half_precision_cannot_hold_is_left_to_torch() -> None:
    x, rate = torch.linspace(-2, 2, 64).half(), 1 - 1e-6
    assert dropout_draws.noise(x, (64,), rate) is None
    assert_same_bits(outcome(dropout_draws.dropout, x, rate, 1, 3), outcome(F.dropout, x, rate, 1, 3))


@pytest.mark.parametrize("skipped", [0, 1, 622, 623, 624, 625, 1247, 1248])
def test_at_the_borders_of_the_twisters_words(skipped: int) -> None:
    for count in (1, 311, 312, 313, 624, 1600):
        x = torch.ones(count)
        found, expected = (outcome(drop, x, 0.3, 5, skipped) for drop in (dropout_draws.dropout, F.dropout))
        assert_same_bits(found, expected)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_a_row_drops_what_its_padded_batch_would_whichever_of_its_places_it_has(data: st.DataObject) -> None:
    batch, length, width = (data.draw(st.integers(1, most)) for most in (4, 9, 33))
    places = torch.tensor(data.draw(st.lists(st.integers(0, batch * length - 1), min_size=1, unique=True)))
    padding, rate = Padding(places, (batch, length)), data.draw(st.sampled_from([0.05, 0.1, 0.5]))
    dtype = data.draw(st.sampled_from(DTYPES))
    x = torch.linspace(-2, 2, len(places) * width).to(dtype).view(1, len(places), width)

    def of_the_padded(x: Tensor, rate: float) -> Tensor:
        return x * F.dropout(x.new_ones(batch, length, width), rate).flatten(0, 1)[places]

    assert_same_bits(outcome(padding.dropout, x, rate, 3, 7), outcome(of_the_padded, x, rate, 3, 7))


def test_layouts_and_tensors_without_numbers_are_left_to_torch() -> None:
    x = torch.linspace(-2, 2, 64).view(8, 8).t()
    assert_same_bits(outcome(dropout_draws.dropout, x, 0.5, 1, 3), outcome(F.dropout, x, 0.5, 1, 3))
    with FakeTensorMode():
        before = torch.empty(4, 64)
        assert dropout_draws.dropout(before, 0.5).shape == before.shape
        assert dropout_draws.noise(before, (4, 64), 0.5) is None


def test_where_torch_draws_otherwise_its_own_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.linspace(-2, 2, 900)
    expected = outcome(F.dropout, x, 0.3, 2, 1)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(dropout_draws, "_kept", lambda count, rate: torch.ones(count, dtype=torch.uint8))
            dropout_draws._agrees.cache_clear()
            assert_same_bits(outcome(dropout_draws.dropout, x, 0.3, 2, 1), expected)
            assert not dropout_draws._agrees(torch.float32)
    finally:
        dropout_draws._agrees.cache_clear()
