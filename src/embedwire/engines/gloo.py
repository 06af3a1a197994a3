"""The collective that ranks agree by, over torch.distributed. Gloo always, whatever the device: the numbers are few and live on the host.

Used by the thread of ``group.driver`` alone, over a process group that nothing else uses, so that no order between threads can matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed


class GlooCollective:
    """A ``group.Collective`` over one Gloo group of all ranks. The group is its maker's to destroy.

    All ranks send to all, and each computes the minimum itself: one exchange, where Gloo's reduction takes two for each further rank, one
    after the other. For so few numbers the exchanges are what takes time.
    """

    def __init__(self, group: Any) -> None:
        self._group = group

    def all_reduce_min(self, words: Sequence[int]) -> list[int]:
        """Raises RuntimeError when a rank is gone, or did not take part within the group's timeout."""
        ranks = distributed.get_world_size(self._group)
        ours = torch.tensor(words, dtype=torch.int64).repeat(ranks)
        everybodys = torch.empty_like(ours)
        distributed.all_to_all_single(everybodys, ours, group=self._group)
        agreed: list[int] = everybodys.view(ranks, -1).amin(0).tolist()
        return agreed
