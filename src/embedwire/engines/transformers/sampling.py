"""Chooses the next token from the logits of one position.

Owns the arithmetic (float32) and the random numbers of one answer; knows neither batches nor models. Every
answer has a generator of its own and draws one number a token, so neighbours do not change its choices.
Called by ``generation`` on the engine's thread; :func:`check_sampling` on any.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from embedwire.errors import InvalidRequestError
from embedwire.language.interface import SamplingParams

_SMALLEST = torch.finfo(torch.float32).tiny
"""A temperature below it would be 0 in float32, and a share of 0 by it is no number."""


def check_sampling(params: SamplingParams) -> None:
    """Raise InvalidRequestError, naming the field as ``param``, for a value that has no meaning."""
    if params.max_tokens < 1:
        raise _invalid("max_tokens", params.max_tokens, "at least 1")
    if not (math.isfinite(params.temperature) and params.temperature >= 0):
        raise _invalid("temperature", params.temperature, "finite and not negative")
    if not 0 < params.top_p <= 1:
        raise _invalid("top_p", params.top_p, "above 0 and at most 1")
    if not all(params.stop):
        raise _invalid("stop", params.stop, "made of strings that are not empty")


def _invalid(name: str, value: object, rule: str) -> InvalidRequestError:
    return InvalidRequestError(f"{name} has to be {rule}, got {value!r}", code="invalid_value", param=name)


class Sampler:
    """The choices of one answer. Equal parameters, seed and logits give equal choices."""

    def __init__(self, params: SamplingParams) -> None:
        self._temperature = params.temperature and max(params.temperature, _SMALLEST)
        self._top_p = params.top_p
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed % 2**64)

    def choose(self, logits: Tensor) -> int:
        """The next token id. ``logits`` is (vocabulary,) in any float dtype, on any device.

        Raises ArithmeticError when they hold NaN or nothing finite: such a model says nothing.
        """
        logits = logits.float()
        likeliest = int(logits.argmax())
        if not math.isfinite(logits[likeliest]):
            raise ArithmeticError(f"the model's logits are not finite: {float(logits[likeliest])}")
        # The draw runs on the CPU, whose cumulative sum is in order and thus the same on every machine.
        return self._draw((logits - logits[likeliest]).cpu()) if self._temperature else likeliest

    def _draw(self, below_max: Tensor) -> int:
        """Draw by inverting the cumulative distribution. The largest of ``below_max`` is 0, so that no
        temperature, however small, makes it overflow."""
        probabilities = (below_max / self._temperature).softmax(0)
        if self._top_p == 1:
            return _invert(probabilities.cumsum(0), self._uniform())
        ids, mass = self._nucleus(probabilities)
        return int(ids[_invert(mass, self._uniform())])

    def _nucleus(self, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest set that reaches ``top_p``, likeliest first, as ids, and its cumulative mass. To sort a whole vocabulary takes many
        times as long as all else here; what is below the bound comes to less than half of what ``top_p`` leaves out."""
        bound = (1 - self._top_p) / (2 * len(probabilities))
        for ids in ((probabilities >= bound).nonzero()[:, 0], torch.arange(len(probabilities))):
            in_order, order = probabilities[ids].sort(descending=True, stable=True)
            mass = in_order.cumsum(0)
            if mass[-1] >= self._top_p:  # else rounding has lost more than that
                break
        kept = max(1, int((mass - in_order < self._top_p).sum()))  # a top_p that float32 takes for 0
        return ids[order[:kept]], mass[:kept]

    def _uniform(self) -> Tensor:
        return torch.rand((), generator=self._generator)


def _invert(mass: Tensor, uniform: Tensor) -> int:
    """The first index whose cumulative mass is above ``uniform`` of the whole; never one of probability 0."""
    total = mass[-1]
    # A product rounded up to the total would point behind the last index.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros(())))
    return int(torch.searchsorted(mass, target, right=True))
