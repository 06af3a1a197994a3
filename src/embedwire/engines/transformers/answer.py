"""One answer, from the request to its last delta.

Owns what a running request remembers: its sampler, its text so far, how many tokens are left. Must not know
batches, models or other answers. Lives on the engine's thread; only ``cancel`` may be called from another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Set

from torch import Tensor

from embedwire.engines.transformers.detokenize import Detokenizer, StopStrings, Vocabulary
from embedwire.engines.transformers.sampling import Sampler
from embedwire.language.interface import Delta, FinishReason, SamplingParams

_log = logging.getLogger(__name__)


class Answer:
    """A :class:`~embedwire.language.interface.Generation`. It is ``finished`` once its last delta was given
    out.

    ``budget_tokens`` is how many tokens it may still have, ``end_ids`` are the tokens that end it; such a
    token is among the ids of the answer, but not in its text. ``total_tokens`` is the most that prompt and
    answer come to. ``last_token`` stands at ``position`` (which is not its index, where the model's
    positions are of three axes); both are meant for the next step of decoding.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt_tokens: int,
        position_delta: int,
        budget_tokens: int,
        end_ids: Set[int],
        vocabulary: Vocabulary,
        on_delta: Callable[[Delta], None],
    ) -> None:
        self.budget_tokens = budget_tokens
        self.total_tokens = prompt_tokens + budget_tokens
        self.is_cancelled = False
        self.finished = False
        self.last_token = -1
        self.position = prompt_tokens + position_delta - 1
        self._end_ids = end_ids
        self._sampler = Sampler(params)
        self._detokenizer = Detokenizer(vocabulary)
        self._stops = StopStrings(params.stop)
        self._on_delta = on_delta

    def cancel(self) -> None:
        # The engine looks at this flag every turn, and it takes turns as long as it has an unfinished answer.
        self.is_cancelled = True

    def take(self, logits: Tensor) -> None:
        """Choose the next token from ``logits`` (vocabulary,) and give it out. Raises ArithmeticError when
        they say nothing."""
        token = self._sampler.choose(logits)
        self.last_token = token
        self.budget_tokens -= 1
        self.position += 1
        ends = token in self._end_ids
        text, stopped = ("", False) if ends else self._stops.push(self._detokenizer.push(token))
        if stopped:
            self._give(Delta((token,), text, "stop"))
        elif ends or self.budget_tokens == 0:
            rest, _ = self._stops.push(self._detokenizer.flush())
            self._give(Delta((token,), text + rest + self._stops.flush(), "stop" if ends else "length"))
        else:
            self._give(Delta((token,), text))

    def end(self, reason: FinishReason, *, error: str | None = None) -> None:
        """Give out the last delta, without a token. Not to be called when it is ``finished``."""
        assert not self.finished
        self._give(Delta(finish_reason=reason, error=error))

    def _give(self, delta: Delta) -> None:
        self.finished = delta.finish_reason is not None
        try:
            self._on_delta(delta)
        except Exception:
            # Its reader is broken, so nobody waits for the rest. The others must not suffer.
            _log.exception("on_delta raised; its answer ends here")
            self.finished = True
