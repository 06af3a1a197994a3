"""Floor 3: threads, sockets and clocks. Drives protocol and transports; knows no models.

driver.py    the thread, its poll and its tasks
sender.py    SenderEndpoint, Offer          writer.py   one thread a receiver, which moves the bytes
receiver.py  ReceiverEndpoint, Reception    stats.py    snapshots and reports
"""

from embedwire.endpoint.receiver import Received, ReceiverEndpoint, Reception
from embedwire.endpoint.sender import Offer, SenderEndpoint
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
