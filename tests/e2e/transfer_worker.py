"""One endpoint in a process of its own, told what to do line by line, so that a test can kill or stop it.

``python transfer_worker.py sender|receiver WIRE PORT``. Every answer is one line too; the process ends with
its input.

    sender    offer ROOM ATTEMPT TOKENS    "offered"
              hold                         "holding"; the next write stops where it was permitted, and says "held"
              go                           "going"; it goes on
              ended ROOM ATTEMPT           "done", or the cause
    receiver  open ROOM ATTEMPT ADDRESS    "opened"
              ended ROOM ATTEMPT           "done" once every byte was checked, or the cause
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

from embedwire.endpoint import ReceiverEndpoint, SenderEndpoint
from embedwire.errors import TransferError
from embedwire.limits import Limits
from embedwire.memory.layout import multimodal
from embedwire.testing.payload import differing, payload
from embedwire.transports.onesided.outbound import OneSidedRegion
from embedwire.transports.shm import ShmRegion
from embedwire.transports.tcp.outbound import TcpRegion

LAYOUT = multimodal(8)
LIMITS = Limits(retry_s=0.05, peer_silence_s=2.0, write_timeout_s=2.0, close_s=2.0)


def say(*words: object) -> None:
    print(*words, flush=True)


class Hold:
    """Stops writes between the permission and the bytes: the worst moment."""

    def __init__(self) -> None:
        self.is_on = False
        self.go = threading.Event()
        for region in (ShmRegion, TcpRegion, OneSidedRegion):
            self._wrap(region)

    def _wrap(self, region: Any) -> None:
        real = region.write

        def write(this: Any, *args: Any, is_permitted: Callable[[], bool], **more: Any) -> Any:
            def ask() -> bool:
                answer = is_permitted()
                if self.is_on:
                    self.is_on = False
                    say("held")
                    self.go.wait()
                return answer

            return real(this, *args, is_permitted=ask, **more)

        region.write = write


def ended(room: Any) -> str:
    try:
        received = room.result(30)
    except TransferError as error:
        return error.cause
    if hasattr(received, "arrays"):
        expected = payload(LAYOUT, received.report.total_tokens, room=received.room)
        assert differing(LAYOUT, expected, received.arrays) == []
        received.release()
    return "done"


def main(role: str, wire: str, port: str) -> None:
    hold, rooms = Hold(), {}
    settings: dict[str, Any] = {"transports": (wire,), "limits": LIMITS}
    endpoint: Any = (
        SenderEndpoint(LAYOUT, port=int(port), **settings)
        if role == "sender"
        else ReceiverEndpoint(LAYOUT, num_blocks=4, **settings)
    )
    with endpoint:
        say(endpoint.address if role == "sender" else "ready")
        for line in sys.stdin:
            match line.split():
                case ["offer", room, attempt, tokens]:
                    offer = endpoint.offer(int(room), attempt=int(attempt), total_tokens=int(tokens))
                    offer.fill(payload(LAYOUT, int(tokens), room=int(room)))
                    rooms[room, attempt] = offer
                    say("offered")
                case ["open", room, attempt, address]:
                    rooms[room, attempt] = endpoint.open(int(room), address, attempt=int(attempt))
                    say("opened")
                case ["ended", room, attempt]:
                    say(ended(rooms[room, attempt]))
                case ["hold"]:
                    hold.is_on = True
                    say("holding")
                case ["go"]:
                    hold.go.set()
                    say("going")


if __name__ == "__main__":
    main(*sys.argv[1:])
