"""Floor 4: several ranks that receive, or send, as one. Optional: ``endpoint`` does not import it. It imports no torch: the collective is
injected.

agreement.py    the numbers by which ranks agree             coordinator.py  what a rank derives from them (sans-IO)
driver.py       the steps, a thread of their own             contract.py     what it needs: a member, a collective
messages.py     what the ranks send each other
member.py       a receiver that is one rank; RankConfig      senders.py      the senders of several encoder ranks
"""

from embedwire.group.contract import Collective
from embedwire.group.member import RankConfig
from embedwire.group.senders import FollowingSender, LeadingSender

__all__ = ["Collective", "FollowingSender", "LeadingSender", "RankConfig"]
