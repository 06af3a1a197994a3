"""Floor 3: threads, sockets and clocks. Drives protocol and transports; knows no models.

event_loop.py  the thread, its sockets, its poll and its tasks      identity.py  routing ids, keys
sender.py    SenderEndpoint     offer.py      one room on its way out
receiver.py  ReceiverEndpoint   reception.py  one room on its way in
landing.py   the pool, the wires into it, the way out of it        watch.py  looking for what has landed
writer.py    one thread a receiver, which moves the bytes
member.py    what a receiver leaves to its group of ranks
stats.py     snapshots and reports
"""

from embedwire.endpoint.offer import Offer
from embedwire.endpoint.receiver import ReceiverEndpoint
from embedwire.endpoint.reception import Received, Reception
from embedwire.endpoint.sender import SenderEndpoint
from embedwire.endpoint.stats import ReceiveReport, ReceiverStats, SenderStats, SendReport

__all__ = [
    "Offer",
    "ReceiveReport",
    "Received",
    "ReceiverEndpoint",
    "ReceiverStats",
    "Reception",
    "SendReport",
    "SenderEndpoint",
    "SenderStats",
]
