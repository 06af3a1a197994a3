"""What the driver of agreement steps needs: the rooms of its rank, and a collective. Implemented by ``group.member`` and
``engines.gloo``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from embedwire.group.agreement import Facts
from embedwire.group.messages import Opened, Records


class Collective(Protocol):
    """What the ranks share beside their messages. Used by one thread; at most one call a step."""

    def all_reduce_min(self, words: Sequence[int]) -> list[int]:
        """The elementwise minimum over all ranks of int64 numbers; each rank gets the same. Raises when a rank is gone."""
        ...


class StepMember(Protocol):
    """One rank's rooms, as the steps need them. Called on the thread of the steps; each call has been carried out when it returns."""

    @property
    def step(self) -> int:
        """The last step that this rank has contributed its facts to."""
        ...

    @property
    def has_rooms(self) -> bool:
        """Whether rooms are open."""
        ...

    def open_requested(self) -> tuple[Opened, ...]:
        """On rank 0: open the rooms that were requested since the last step, and return them."""
        ...

    def open_as_leader(self, opened: Sequence[Opened]) -> None:
        """On the other ranks: open the same rooms, in this order."""
        ...

    def records(self) -> Records:
        """What this rank adds to the step that begins."""
        ...

    def neutral_facts(self) -> Facts | None:
        """This rank's facts, if they change no minimum."""
        ...

    def facts(self) -> Facts:
        """This rank's facts, as of now, of the rooms that are open when the step begins."""
        ...

    def conclude(self, agreed: Facts, records: Records) -> None:
        """The agreed facts; whatever succeeds now has its assembly among the records of this step or an earlier one."""
        ...

    def group_ended(self, detail: str, *, is_lost: bool) -> None:
        """There are no more steps: the group was closed, or a rank is lost."""
        ...
