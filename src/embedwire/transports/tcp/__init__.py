"""The wire between hosts: plain TCP. The receiver enforces every grant itself, so ``revoke`` is true fencing
here.

``frames`` owns the bytes, ``reading`` what one session may do, ``inbound`` the receiving half; ``stream`` is one connection of a sender,
``outbound`` owns its sessions, ``writing`` one write over them.
"""

from embedwire.transports.tcp.inbound import TcpInbound
from embedwire.transports.tcp.outbound import TcpOutbound

__all__ = ["TcpInbound", "TcpOutbound"]
