"""Metrics: every field of a snapshot shows, under a name that says what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from embedwire.endpoint.stats import ReceiverStats
from embedwire.serve.metrics import AppMetrics
from embedwire.serve.openai import Passage


def samples(metrics: AppMetrics) -> dict[str, float]:
    families = text_string_to_metric_families(metrics.expose().decode())
    return {
        f"{s.name}{''.join(f'[{k}={v}]' for k, v in s.labels.items())}": s.value
        for f in families
        for s in f.samples
    }


def test_an_endpoint_s_snapshot() -> None:
    stats = ReceiverStats(
        rooms={"receiving": 2},
        ended={"done": 5, "peer_lost": 1},
        waiting={"blocks": 3},
        sessions=1,
        rounds_total=9,
        bytes_total=640,
        blocks_total=10,
        blocks_free=4,
        blocks_granted=5,
        blocks_quarantined=1,
        memory_reserved_bytes=100,
        memory_limit_bytes=200,
        frames_refused_total=0,
    )
    found = samples(AppMetrics({"receiver": lambda: stats}))
    assert found["embedwire_receiver_rooms[state=receiving]"] == 2
    assert found["embedwire_receiver_rooms_ended_total[cause=peer_lost]"] == 1
    assert found["embedwire_receiver_waiting[queue=blocks]"] == 3
    assert found["embedwire_receiver_bytes_total"] == 640
    blocks = [found[f"embedwire_receiver_blocks_{kind}"] for kind in ("free", "granted", "quarantined")]
    assert sum(blocks) == found["embedwire_receiver_blocks"] == 10


def test_snapshots_are_taken_anew_and_not_before_they_are_asked_for() -> None:
    @dataclass(frozen=True)
    class Stats:
        waiting: Mapping[str, int]
        running: int

    taken = []

    def take() -> Stats:
        taken.append(1)
        return Stats({}, len(taken))

    metrics = AppMetrics({"service": take})
    assert not taken
    assert [samples(metrics)["embedwire_service_running"] for _ in range(2)] == [1, 2]


def test_stages_are_in_seconds_and_only_those_that_were() -> None:
    metrics = AppMetrics()
    metrics.observe(Passage(ttft_ms=250.0))
    metrics.observe(Passage(ttft_ms=750.0, encode_ms=100.0, transfer_ms=10.0))
    found = samples(metrics)
    assert found["embedwire_ttft_seconds_sum"] == 1.0
    assert (found["embedwire_ttft_seconds_count"], found["embedwire_encode_seconds_count"]) == (2, 1)


def test_two_apps_in_one_process() -> None:
    one, other = AppMetrics(), AppMetrics()
    one.retries.labels("peer_lost").inc()
    assert "embedwire_retries_total[code=peer_lost]" not in samples(other)
