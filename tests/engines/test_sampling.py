"""The choice of the next token, from logits written by hand."""

from __future__ import annotations

import pytest
import torch

from embedwire.engines.transformers.sampling import Sampler, _invert, check_sampling
from embedwire.errors import InvalidRequestError
from embedwire.language.interface import SamplingParams

LOGITS = torch.tensor([0.0, 2.0, 1.0, 2.0, -torch.inf])


def draws(params: SamplingParams, count: int, logits: torch.Tensor = LOGITS) -> list[int]:
    sampler = Sampler(params)
    return [sampler.choose(logits) for _ in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_first_of_the_likeliest(dtype: torch.dtype) -> None:
    assert draws(SamplingParams(), 3, LOGITS.to(dtype)) == [1, 1, 1]


def test_a_seed_repeats_the_draws_and_another_does_not() -> None:
    params = SamplingParams(temperature=1.0, seed=7)
    assert draws(params, 50) == draws(params, 50)
    assert draws(params, 50) != draws(SamplingParams(temperature=1.0, seed=8), 50)
    assert draws(SamplingParams(temperature=1.0, seed=-1), 50) == draws(
        SamplingParams(temperature=1.0, seed=2**64 - 1), 50
    )


def test_draws_do_not_disturb_each_other() -> None:
    """Two answers drawn in turns say what each says alone."""
    one, two = (Sampler(SamplingParams(temperature=1.0, seed=seed)) for seed in (1, 2))
    turns = [(one.choose(LOGITS), two.choose(LOGITS)) for _ in range(40)]
    assert [a for a, _ in turns] == draws(SamplingParams(temperature=1.0, seed=1), 40)
    assert [b for _, b in turns] == draws(SamplingParams(temperature=1.0, seed=2), 40)


def test_draws_follow_the_probabilities() -> None:
    count = 4000
    counts = torch.bincount(torch.tensor(draws(SamplingParams(temperature=1.0, seed=3), count)), minlength=5)
    torch.testing.assert_close(counts / count, LOGITS.softmax(0), atol=0.03, rtol=0)
    assert counts[4] == 0, "a token of probability 0 was drawn"


@pytest.mark.parametrize(
    ("top_p", "allowed"), [(1e-6, {1}), (0.3, {1}), (0.5, {1, 3}), (0.9, {1, 2, 3}), (0.97, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, allowed: set[int]) -> None:
    assert set(draws(SamplingParams(temperature=1.0, top_p=top_p, seed=0), 400)) == allowed


@pytest.mark.parametrize("top_p", [1e-3, 0.5, 0.9, 0.999, 1 - 1e-7])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 1.0, 20.0])
def test_the_set_is_that_of_the_whole_vocabulary_in_order(top_p: float, spread: float) -> None:
    """However few of it are looked at."""
    sampler = Sampler(SamplingParams(temperature=1.0, top_p=top_p))
    for seed in range(20):
        drawn = torch.randn(3000, generator=torch.Generator().manual_seed(seed))
        probabilities = (drawn * spread).round(decimals=1).softmax(0)
        in_order, order = probabilities.sort(descending=True, stable=True)
        mass = in_order.cumsum(0)
        kept = int((mass - in_order < top_p).sum())
        ids, found = sampler._nucleus(probabilities)
        assert ids.tolist() == order[:kept].tolist()
        assert found.tolist() == mass[:kept].tolist()


@pytest.mark.parametrize(("uniform", "index"), [(0.0, 1), (0.24, 1), (0.25, 3), (1 - 2**-24, 3)])
def test_no_draw_falls_on_a_probability_of_zero(uniform: float, index: int) -> None:
    """Not even the first and the last possible one, whose product with the mass is rounded."""
    mass = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]).cumsum(0) * 1.1
    assert _invert(mass, torch.tensor(uniform)) == index


@pytest.mark.parametrize("tiny", [1e-30, 1e-45, 1e-46, 5e-324])
def test_what_float32_can_not_tell_from_zero_is_greedy(tiny: float) -> None:
    """Neither overflows nor makes a token that there is not, which would fail every answer of its batch."""
    for params in (
        SamplingParams(temperature=tiny, seed=0),
        SamplingParams(temperature=1.0, top_p=tiny, seed=0),
        SamplingParams(temperature=tiny, top_p=tiny, seed=0),
    ):
        assert set(draws(params, 50)) <= {1, 3}
        assert set(draws(params, 50, LOGITS * 1e4)) <= {1, 3}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_say_nothing_are_an_error(bad: float) -> None:
    with pytest.raises(ArithmeticError, match="not finite"):
        Sampler(SamplingParams()).choose(torch.tensor([0.0, bad, 1.0]))
    with pytest.raises(ArithmeticError, match="not finite"):
        Sampler(SamplingParams(temperature=1.0)).choose(torch.full((3,), -torch.inf))


@pytest.mark.parametrize(
    ("params", "name"),
    [
        (SamplingParams(max_tokens=0), "max_tokens"),
        (SamplingParams(temperature=-0.1), "temperature"),
        (SamplingParams(temperature=float("nan")), "temperature"),
        (SamplingParams(temperature=float("inf")), "temperature"),
        (SamplingParams(top_p=0.0), "top_p"),
        (SamplingParams(top_p=1.1), "top_p"),
        (SamplingParams(top_p=float("nan")), "top_p"),
        (SamplingParams(stop=("a", "")), "stop"),
    ],
)
def test_values_without_a_meaning_are_refused_by_name(params: SamplingParams, name: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_sampling(params)
    assert caught.value.param == name


def test_ordinary_values_pass() -> None:
    check_sampling(SamplingParams(temperature=2.0, top_p=1.0, stop=("###",)))
