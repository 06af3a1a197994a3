"""Resume: how a room goes through more than one round. Every cell is checked by the world itself."""

from __future__ import annotations

import pytest

from embedwire.limits import Limits
from embedwire.protocol.messages import Cause, Init, ResumeTransfer, RoomKey, Status
from embedwire.protocol.states import Poll
from embedwire.testing.sim_link import delay
from embedwire.testing.sim_memory import aux_of
from embedwire.testing.sim_receiver import ReceiverNode
from embedwire.testing.simulation import FENCED, Transfer, World


def transfer_alone(
    total: int, default: int, *, block_size: int = 128, num_blocks: int = 512
) -> tuple[World, Transfer]:
    """A world with one room in it, at rest; one round at a time."""
    world = World(limits=Limits(window_rounds=1))
    world.add_sender()
    world.add_receiver(default_allocate_tokens=default, block_size=block_size, num_blocks=num_blocks)
    transfer = world.request(7, total)
    world.settle()
    assert transfer.is_done
    return world, transfer


def script_grants(receiver: ReceiverNode, *blocks: int) -> None:
    """The rounds of every room get so many blocks, one after another."""
    receiver.core.admission._wanted = lambda room: blocks[len(room.round_sizes)]  # type: ignore[method-assign]


def statuses(world: World) -> list[Status]:
    return [e.message for e in world.link.sent if isinstance(e.message, Status)]


@pytest.mark.failure_mode("resume-never-triggered")
def test_resume_is_triggered() -> None:
    """2000/1024, B = 128: two rounds, 1024 and 976."""
    world, transfer = transfer_alone(2000, 1024)
    assert transfer.rounds == (1024, 976)
    assert world.link.count()["Init"] == world.link.count()["ResumeTransfer"] == 1


@pytest.mark.failure_mode("grant-not-whole-blocks")
@pytest.mark.invariant("alignment")
@pytest.mark.parametrize(("remainder", "announced"), [(976, 1024), (1000, 1024)])
def test_grants_announce_whole_blocks(remainder: int, announced: int) -> None:
    """Default 8000, B = 128: 63 blocks and 8064; a remainder of 976 or 1000 takes 8 blocks and announces 1024."""
    _, transfer = transfer_alone(8064 + remainder, 8000)
    first, second = transfer.grants
    assert (len(first.block_indices), first.allocated_tokens) == (63, 8064)
    assert (len(second.block_indices), second.allocated_tokens) == (8, announced)
    assert transfer.rounds == (8064, remainder)


@pytest.mark.failure_mode("aux-read-from-resumed-block")
@pytest.mark.invariant("aux-once")
def test_aux_is_read_from_round_0_only() -> None:
    """8192 tokens in blocks 0–63, 976 in 64–71, whose aux rows are 0: the total stays 9168."""
    world, transfer = transfer_alone(9168, 8192, num_blocks=128)
    assert [g.block_indices for g in transfer.grants] == [tuple(range(64)), tuple(range(64, 72))]
    assert isinstance(transfer.receiver, ReceiverNode)
    memory = transfer.receiver.memory
    assert memory.aux[0] == aux_of(RoomKey(7), 9168)
    assert memory.aux[64] == (0,) * 16
    assert sum(transfer.rounds) == 9168
    assert world.link.count()["ResumeTransfer"] == 1


@pytest.mark.failure_mode("resume-repeated-while-waiting")
def test_one_resume_a_round_however_often_the_status_comes() -> None:
    """Every status arrives four times while the poll stays TRANSFERRING: one grant per round."""
    world = World(limits=Limits(window_rounds=1))
    world.add_sender()
    world.add_receiver(default_allocate_tokens=1024, num_blocks=8)
    world.link.rules.append(delay(Status, 0.001, 0.0011, 0.002, 0.003))
    transfer = world.request(7, 5000)
    world.settle()
    assert transfer.is_done
    assert transfer.rounds == (1024, 1024, 1024, 1024, 904)
    assert [g.round for g in transfer.grants] == [0, 1, 2, 3, 4]
    assert world.link.count()["ResumeTransfer"] == 4
    assert {s.poll for s in statuses(world)} == {Poll.TRANSFERRING}


@pytest.mark.failure_mode("reused-indices-taken-for-same-round")
@pytest.mark.invariant("token-progress")
def test_the_same_blocks_again_are_another_round() -> None:
    """[0–63] three times; progress 8192, 16384, 24576 separates the rounds."""
    world, transfer = transfer_alone(24576, 8192, num_blocks=64)
    assert [g.block_indices for g in transfer.grants] == [tuple(range(64))] * 3
    assert [g.start_token for g in transfer.grants] == [0, 8192, 16384]
    assert {8192, 16384, 24576} <= {s.sent_tokens for s in statuses(world)}


@pytest.mark.failure_mode("partial-reported-as-success")
@pytest.mark.parametrize(
    ("total", "default", "rounds"), [(2000, 1024, (1024, 976)), (500, 1024, (500,)), (1024, 1024, (1024,))]
)
def test_partial_and_exact_fits(total: int, default: int, rounds: tuple[int, ...]) -> None:
    """2000/1024 is partial; 500/1024 and 1024/1024 are not, and are not resumed."""
    world, transfer = transfer_alone(total, default)
    assert transfer.rounds == rounds
    assert world.link.count()["ResumeTransfer"] == len(rounds) - 1
    assert all(s.poll is Poll.TRANSFERRING for s in statuses(world)), "nobody says success before done"


@pytest.mark.failure_mode("last-round-by-configured-size")
def test_what_was_granted_decides_not_what_was_configured() -> None:
    """2000 tokens, default 1024, blocks of 400, so 1200 are granted: 1200 + 800."""
    _, transfer = transfer_alone(2000, 1024, block_size=400)
    assert [g.allocated_tokens for g in transfer.grants] == [1200, 800]
    assert transfer.rounds == (1200, 800)


@pytest.mark.failure_mode("later-rounds-lose-fields")
@pytest.mark.parametrize("rounds", [(8192, 16384, 25424), (8192, 8192, 16384, 17232)])
def test_three_rounds_and_more(rounds: tuple[int, ...]) -> None:
    """50000 = 8192 + 16384 + 25424 = 8192 + 8192 + 16384 + 17232."""
    world = World()
    world.add_sender()
    receiver = world.add_receiver(num_blocks=512)
    script_grants(receiver, *(-(-tokens // 128) for tokens in rounds))
    transfer = world.request(7, 50000)
    world.settle()
    assert transfer.is_done
    assert transfer.rounds == rounds


@pytest.mark.failure_mode("aux-view-of-freed-block")
@pytest.mark.invariant("aux-once")
def test_aux_outlives_its_block() -> None:
    """While room 7 waits for more blocks, room 9 gets its block and aux row; room 7 keeps its own total and delta."""
    world = World()
    world.add_sender()
    receiver = world.add_receiver(num_blocks=1)
    first, second = world.request(7, 300), world.request(9, 301)
    world.run_until(lambda: receiver.memory.aux[0] == aux_of(RoomKey(9), 301))
    announced = receiver.core.lanes.transfers[RoomKey(7)].announced
    assert announced is not None
    assert announced.aux == aux_of(RoomKey(7), 300)
    world.settle()
    assert first.is_done
    assert second.is_done
    assert first.rounds == (128, 128, 44)


@pytest.mark.failure_mode("status-raised-again")
def test_failed_is_final_even_if_success_comes_late() -> None:
    """A status with everything landed, and one with a lower poll, arrive after the room has failed."""
    world = World()
    sender = world.add_sender()
    receiver = world.add_receiver()
    transfer = world.request(7, 1000)
    world.run_until(lambda: bool(transfer.grants))
    receiver.abort(transfer.key)
    for poll in (Poll.SUCCESS, Poll.WAITING_FOR_INPUT):
        receiver.do(
            receiver.core.on_message(
                Status(
                    source=sender.process.incarnation,
                    target=receiver.process.incarnation,
                    room=7,
                    poll=poll,
                    sent_tokens=1000,
                ),
                sender.address,
                now=world.now,
            )
        )
        assert receiver.core.lanes.transfers[RoomKey(7)].poll is Poll.FAILED
    world.settle()
    assert transfer.receiver_end is transfer.sender_end is Cause.ABORTED


@pytest.mark.failure_mode("repeated-grant-written-twice")
@pytest.mark.invariant("token-progress")
@pytest.mark.parametrize("kind", [Init, ResumeTransfer])
def test_a_grant_that_comes_again_writes_nothing_again(kind: type[Init | ResumeTransfer]) -> None:
    """The same grant arrives four times while TRANSFERRING and once minutes later: one write per round."""
    world = World()
    sender = world.add_sender()
    world.add_receiver(default_allocate_tokens=1024)
    world.link.rules.append(delay(kind, 0.001, 0.0011, 0.0015, 0.003, 200.0))
    transfer = world.request(7, 2000)
    world.settle()
    assert transfer.is_done
    assert [w.round.number for w in sender.writes] == [0, 1]


@pytest.mark.failure_mode("extreme-length")
@pytest.mark.parametrize(
    ("total", "default", "num_blocks", "rounds"),
    [
        (10000, 8192, 512, (8192, 1808)),
        (10000, 4096, 512, (4096, 5904)),
        (12000, 8192, 512, (8192, 3808)),
        (100000, 16384, 1024, (16384, 83616)),
        (100000, 16384, 1, (128,) * 781 + (32,)),
    ],
)
def test_sizes_worth_keeping(total: int, default: int, num_blocks: int, rounds: tuple[int, ...]) -> None:
    """10000/8192, 10000/4096, 12000/8192, 100000/16384, and 100,000 tokens through a pool of 1 block."""
    _, transfer = transfer_alone(total, default, num_blocks=num_blocks)
    assert transfer.rounds == rounds


def test_a_window_keeps_several_grants_open() -> None:
    """With a window of 3 the next grants are out before the first has landed, and again after each that was drained."""

    world = World(limits=Limits(window_rounds=3))
    world.add_sender()
    receiver = world.add_receiver(num_blocks=3, default_allocate_tokens=128, wire=FENCED)
    transfer = world.request(7, 128 * 12)
    most_open: list[int] = []
    while world.step():
        room = receiver.core.lanes.transfers.get(transfer.key)
        most_open.append(len(room.open_rounds) if room is not None else 0)
    world.settle()
    assert transfer.is_done
    assert max(most_open) == 3
    gaps = [e.message.round for e in world.link.sent if isinstance(e.message, Init | ResumeTransfer)]
    assert gaps == list(range(12))
    sent = [type(e.message).__name__ for e in world.link.sent]
    after_third_grant = sent[sent.index("ResumeTransfer") + 2 :]
    assert after_third_grant.index("ResumeTransfer") < 8, (
        "the window is refilled at once, not when it is empty"
    )
