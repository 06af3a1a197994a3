"""The table of workers, without any clock or socket."""

from __future__ import annotations

import contextlib

import msgspec
import pytest

from embedwire.errors import ConfigurationError, OverloadedError
from embedwire.registry import Registry, Role, Worker


def worker(name: str, role: Role = Role.ENCODER, **changes: object) -> Worker:
    base = Worker(role=role, url=f"http://{name}:80", model="m", fingerprint="f", incarnation=1)
    return msgspec.structs.replace(base, **changes)


def table(*workers: Worker, **settings: float) -> Registry:
    registry = Registry(**settings)  # type: ignore[arg-type]
    for w in workers:
        registry.register(w, now=0.0)
    return registry


def picks(registry: Registry, count: int) -> list[str]:
    found = [registry.pick(Role.ENCODER) for _ in range(count)]
    return [w.url for w in found if w]


def test_registering_twice_is_one_entry() -> None:
    registry = table(worker("a"), worker("a"))
    assert len(registry) == 1
    registry.register(worker("a", model="other"), now=5.0)
    (entry,) = registry
    assert (entry.worker.model, entry.seen_s) == ("other", 5.0)


def test_equal_load_goes_round_robin() -> None:
    assert (
        picks(table(worker("a"), worker("b"), worker("c")), 6)
        == ["http://a:80", "http://b:80", "http://c:80"] * 2
    )


def test_least_load_wins() -> None:
    registry = table(worker("a"), worker("b"))
    with registry.loaded("http://a:80", 100):
        assert picks(registry, 3) == ["http://b:80"] * 3
        with registry.loaded("http://b:80", 101):
            assert picks(registry, 1) == ["http://a:80"]
    assert registry.load("http://a:80") == registry.load("http://b:80") == 0


def test_load_is_given_back_after_an_error_and_after_removal() -> None:
    registry = table(worker("a"))
    with contextlib.suppress(KeyError), registry.loaded("http://a:80", 7):
        registry.remove("http://a:80")
        registry.register(worker("a"), now=1.0)
        assert registry.load("http://a:80") == 7
        raise KeyError
    assert registry.load("http://a:80") == 0


@pytest.mark.failure_mode("one-failure-shuts-peer-out")
def test_missed_checks_evict_and_an_answer_revives() -> None:
    """One failed check does not evict a worker, and no eviction is permanent."""
    registry = table(worker("a"), worker("b"), misses_to_evict=2)
    registry.missed("http://a:80")
    assert len(registry.candidates(Role.ENCODER)) == 2
    registry.missed("http://a:80")
    assert picks(registry, 2) == ["http://b:80"] * 2
    registry.register(worker("a"), now=1.0)
    assert len(registry.candidates(Role.ENCODER)) == 1, "a heartbeat is no proof that it can be reached"
    registry.answered("http://a:80", now=2.0)
    assert len(registry.candidates(Role.ENCODER)) == 2


@pytest.mark.failure_mode("restart-on-same-address")
def test_a_new_life_starts_with_a_clean_sheet() -> None:
    """A worker restarted on the same port is usable at once."""
    registry = table(worker("a"), misses_to_evict=1)
    registry.missed("http://a:80")
    assert not registry.candidates(Role.ENCODER)
    registry.register(worker("a", incarnation=2), now=1.0)
    assert registry.candidates(Role.ENCODER)


def test_an_old_life_can_not_remove_the_new_one() -> None:
    registry = table(worker("a", incarnation=2))
    assert not registry.remove("http://a:80", incarnation=1)
    assert registry.remove("http://a:80", incarnation=2)
    assert not registry.remove("http://a:80")


def test_pick_by_role_model_layout_and_avoid() -> None:
    language = worker("l", Role.LANGUAGE, fingerprint="g")
    registry = table(worker("a"), worker("b", model="n"), language)
    assert registry.pick(Role.LANGUAGE) == language
    assert registry.pick(Role.ENCODER, model="n") == worker("b", model="n")
    assert registry.pick(Role.ENCODER, fingerprint="g") is None
    assert registry.pick(Role.ENCODER, model="m", avoid=["http://a:80"]) is None
    assert registry.models() == ["m"]


def test_the_silent_are_forgotten() -> None:
    registry = table(worker("a"), worker("b"), forget_after_s=10.0)
    registry.answered("http://b:80", now=8.0)
    registry.forget_silent(now=11.0)
    assert [e.worker.url for e in registry] == ["http://b:80"]


def test_the_table_is_bounded() -> None:
    registry = table(worker("a"), workers_max=1)
    registry.register(worker("a"), now=1.0)
    with pytest.raises(OverloadedError, match="1 workers"):
        registry.register(worker("b"), now=1.0)


def test_unknown_urls_are_harmless() -> None:
    registry = table()
    registry.missed("http://x:80")
    registry.answered("http://x:80", now=0.0)
    assert len(registry) == 0


@pytest.mark.parametrize(
    "url",
    ["ftp://a", "http://a/path", "a:80", "http://", "http://a b", "http://a:80000", "http://[10.0.0.5]:80"],
)
def test_a_worker_needs_a_base_url(url: str) -> None:
    good = msgspec.to_builtins(worker("a"))
    with pytest.raises(msgspec.ValidationError, match="url"):
        msgspec.convert(good | {"url": url}, Worker)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigurationError, match="misses_to_evict"):
        Registry(misses_to_evict=0)
