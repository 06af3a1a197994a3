"""Floor 0: the transfer protocol without clocks, threads, sockets or arrays.

Input is a message or an event, with ``now`` as an argument; output is a list of actions. So every interleaving can be
tried, and every failure replayed from its seed.

    states.py         both halves of a room as tables, and the sets that matter
    messages.py       what travels, and how it is checked
    sender.py         one lane on the sending side            sender_core.py    all rooms and sessions of a sender
    receiver.py       one lane on the receiving side          receiver_lanes.py all lanes and sessions of a receiver
                                                              receiver_core.py  all its rooms
    coordinator.py    when a receiver's room begins and how it ends: the interface, and the one of a receiver that is alone
    handshake.py      how a session begins, and why it does not
    tombstones.py     how ended rooms ended, to answer a late message
    admission.py      who gets assembly memory and blocks, in which order
    timers.py         which room is due next
    actions.py        the orders that the cores give to their drivers
"""
