"""One room of a simulated world, as tests look at it: both its ends, over all ranks. Changes nothing."""

from __future__ import annotations

from typing import TypeAlias

from embedwire.protocol.actions import Failed, Finished
from embedwire.protocol.messages import Cause, Grant, RoomKey
from embedwire.testing.sim_group import EncoderGroup, Group
from embedwire.testing.sim_receiver import ReceiverNode
from embedwire.testing.sim_sender import SenderNode

Sender: TypeAlias = SenderNode | EncoderGroup
Receiver: TypeAlias = ReceiverNode | Group


class Transfer:
    """One room of the world, seen from both ends. Ends are of the processes that took it up."""

    def __init__(self, key: RoomKey, total_tokens: int, sender: Sender, receiver: Receiver) -> None:
        self.key = key
        self.total_tokens = total_tokens
        self.sender = sender
        self.receiver = receiver
        self.is_refused_at_once = False

    @property
    def grants(self) -> list[Grant]:
        """What the receiver granted, round by round."""
        return self.receiver.nodes[0].grants[self.key]

    @property
    def rounds(self) -> tuple[int, ...]:
        """Tokens of each round that the sender wrote; known at its end. Of lane 0, where there are several."""
        return self.lane_rounds.get(self.key, ())

    @property
    def lane_rounds(self) -> dict[RoomKey, tuple[int, ...]]:
        """Those of each lane of a room that has ended at its sender."""
        ends = [node.ends[self.key] for node in self.sender.nodes if self.key in node.ends]
        return {lane.key: lane.rounds for end in ends for lane in end.lanes}

    @property
    def sender_end(self) -> Cause | None:
        """Why the sender's room ended."""
        causes = [node.ends[self.key].cause for node in self.sender.nodes if self.key in node.ends]
        failed = next((cause for cause in causes if cause is not Cause.DONE), None)
        return failed or (Cause.DONE if len(causes) == len(self.sender.nodes) else None)

    @property
    def receiver_end(self) -> Cause | None:
        """Why the receiver's room ended."""
        end = self.receiver.nodes[0].ends.get(self.key)
        if isinstance(end, Failed):
            return end.cause
        return Cause.DONE if isinstance(end, Finished) else None

    @property
    def is_done(self) -> bool:
        """Whole, on both sides."""
        ends = [node.ends.get(self.key) for node in self.receiver.nodes]
        return self.sender_end is Cause.DONE and all(isinstance(end, Finished) for end in ends)
