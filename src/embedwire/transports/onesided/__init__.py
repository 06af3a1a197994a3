"""Wires over one-sided engines: the vendor's library moves the bytes, and a connection of our own proves who may still write.

Such an engine writes into memory whose owner sees nothing of it, and a write that timed out may land later.
So every session has a TCP connection beside it, which the kernel closes when the sender's process ends and
not when it is stopped, and a receiving engine of its own, which is destroyed with it: what has no engine to
go through can not land.

``engine`` is what an adapter implements, ``greeting`` owns the bytes, ``inbound`` the receiving half;
``batches`` cuts slices, ``session`` owns one connection and its engine, ``outbound`` the sending half.
"""

from embedwire.transports.onesided.inbound import OneSidedInbound
from embedwire.transports.onesided.outbound import OneSidedOutbound

__all__ = ["OneSidedInbound", "OneSidedOutbound"]
