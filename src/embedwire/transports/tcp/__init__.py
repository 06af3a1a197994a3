"""The wire between hosts: plain TCP. The receiver enforces every grant itself, so ``revoke`` is true fencing
here.

``frames`` owns the bytes, ``connection`` what one accepted connection may do,
``inbound`` the receiver's thread, ``outbound`` the sender's streams and sessions, ``writing`` one write over
them.
"""

from embedwire.transports.tcp.inbound import TcpInbound
from embedwire.transports.tcp.outbound import TcpOutbound

__all__ = ["TcpInbound", "TcpOutbound"]
