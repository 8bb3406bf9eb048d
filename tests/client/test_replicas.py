"""Which replica a call goes to: picks, loads, probes, Locate's answers; no socket."""

import random
from collections import Counter

import pytest
from graphkv_client._replicas import MAX_REPLICAS, Errand, Replica, Replicas, Seat, is_near


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def replicas(clock: Clock, *, locate: bool = True, spread: bool = False, seed: int = 1) -> Replicas:
    known = Replicas(
        "given:1", locate=locate, clock=clock, chance=random.Random(seed), near=lambda seat: "near" in seat.address
    )
    known.spread = spread
    return known


def seats(*names: str, load: float = 0.0) -> list[Seat]:
    return [Seat(name, f"{name}:1", load) for name in names]


def served(known: Replicas, *names: str) -> None:
    """Locate answers with these, and each answers its probe."""
    known.seats(seats(*names))
    for errand in known.errands():
        if not errand.locate:
            known.probed(errand.replica, errand.replica.name)


def picks(known: Replicas, tried: tuple[Replica, ...] = (), count: int = 200) -> Counter[str]:
    return Counter(known.choose(tried).address for _ in range(count))


def by_name(known: Replicas, name: str) -> Replica:
    return next(replica for replica in known.all if replica.name == name)


def locates(errands: list[Errand]) -> list[str]:
    return [errand.replica.address for errand in errands if errand.locate]


def test_the_given_address_serves_until_somebody_is_located_and_answers(clock: Clock) -> None:
    known = replicas(clock)
    assert not known.located
    assert locates(known.errands()) == ["given:1"]
    known.seats(seats("a", "b"))
    assert known.located
    assert set(picks(known)) == {"given:1"}
    probes = known.errands()
    assert {errand.replica.name for errand in probes} == {"a", "b"}
    known.probed(by_name(known, "a"), "a")
    assert set(picks(known)) == {"a:1"}
    known.probed(by_name(known, "b"), "b")
    assert set(picks(known)) == {"a:1", "b:1"}


def test_addresses_that_cannot_be_reached_leave_the_given_one(clock: Clock) -> None:
    known = replicas(clock)
    known.seats(seats("a", "b"))
    for errand in known.errands():
        if not errand.locate:
            known.probed(errand.replica, None)
    assert set(picks(known)) == {"given:1"}


def test_another_replica_at_the_address_is_not_the_one_that_was_named(clock: Clock) -> None:
    known = replicas(clock)
    known.seats(seats("a"))
    known.probed(by_name(known, "a"), "somebody-else")
    assert set(picks(known)) == {"given:1"}


def test_without_locate_nothing_is_asked(clock: Clock) -> None:
    known = replicas(clock, locate=False)
    assert known.located
    assert known.errands() == []
    assert set(picks(known)) == {"given:1"}


def test_a_service_that_cannot_tell_is_not_asked_all_the_time(clock: Clock) -> None:
    known = replicas(clock)
    known.errands()
    known.nobody_tells()
    assert known.located
    clock.now += 40
    assert known.errands() == []
    clock.now += 60
    assert locates(known.errands()) == ["given:1"]


def test_locate_is_asked_again_every_few_seconds_of_anybody_and_once_at_a_time(clock: Clock) -> None:
    known = replicas(clock)
    known.errands()
    served(known, "a", "b")
    assert locates(known.errands()) == []
    asked: Counter[str] = Counter()
    for _ in range(60):
        clock.now += 4
        (guide,) = locates(known.errands())
        assert locates(known.errands()) == [], "one is under way"
        asked[guide] += 1
        known.seats(seats("a", "b"))
    assert set(asked) == {"a:1", "b:1"}


def test_a_failure_asks_who_serves_soon_but_not_too_often(clock: Clock) -> None:
    known = replicas(clock)
    known.errands()
    served(known, "a", "b")
    asked = 0
    for _ in range(100):
        clock.now += 0.01
        known.failed(by_name(known, "a"))
        if locates(known.errands()):
            asked += 1
            known.seats(seats("a", "b"))
    assert 3 <= asked <= 5


def test_a_locate_that_fails_is_asked_of_another_soon(clock: Clock) -> None:
    known = replicas(clock)
    known.errands()
    known.not_told()
    clock.now += 1
    assert locates(known.errands()) == ["given:1"]


def test_the_less_busy_of_two_is_taken(clock: Clock) -> None:
    known = replicas(clock)
    served(known, *"abcd")
    by_name(known, "a").load = 0.9
    counts = picks(known, count=4000)
    assert counts["a:1"] == 0, "it wins against nobody"
    by_name(known, "a").load = 0.0
    by_name(known, "b").calls = 5
    counts = picks(known, count=4000)
    assert counts["b:1"] == 0
    assert min(counts["a:1"], counts["c:1"], counts["d:1"]) > 1000


def test_own_calls_keep_replicas_even(clock: Clock) -> None:
    known = replicas(clock)
    served(known, *"abcdef")
    for _ in range(600):
        known.choose().calls += 1
    counts = [replica.calls for replica in known.all if replica.name]
    assert max(counts) - min(counts) <= 6


def test_replicas_on_this_host_come_first_unless_they_are_full(clock: Clock) -> None:
    known = replicas(clock)
    served(known, "a", "near-b", "near-c")
    assert set(picks(known)) == {"near-b:1", "near-c:1"}
    by_name(known, "near-b").load = 0.9
    assert set(picks(known)) == {"near-c:1"}
    by_name(known, "near-c").load = 0.95
    assert picks(known)["a:1"] > 0


def test_who_was_tried_is_not_tried_again_while_there_are_others(clock: Clock) -> None:
    known = replicas(clock)
    served(known, "a", "b")
    a, b = by_name(known, "a"), by_name(known, "b")
    assert set(picks(known, (a,))) == {"b:1"}
    assert known.elsewhere((a,))
    assert set(picks(known, (a, b))) == {"given:1"}, "the address may lead to others"
    assert set(picks(known, (a, b, known.given))) == {"a:1", "b:1"}
    assert not known.elsewhere((a, b, known.given))


def test_a_failed_replica_is_out_until_its_probe_is_answered(clock: Clock) -> None:
    known = replicas(clock)
    served(known, "a", "b")
    a = by_name(known, "a")
    known.failed(a, deep=True)
    assert set(picks(known)) == {"b:1"}
    clock.now += 1
    (probe,) = [errand for errand in known.errands() if not errand.locate]
    assert probe.replica is a
    assert probe.deep
    known.probed(a, None)
    assert set(picks(known)) == {"b:1"}
    clock.now += 2
    assert [errand.replica for errand in known.errands() if not errand.locate] == [a]
    known.probed(a, "a")
    assert set(picks(known)) == {"a:1", "b:1"}


def test_a_replica_that_is_no_longer_named_gets_no_calls_and_comes_back_through_a_probe(clock: Clock) -> None:
    known = replicas(clock)
    served(known, "a", "b")
    a = by_name(known, "a")
    assert known.listed(a)
    served(known, "b")
    assert not known.listed(a)
    assert set(picks(known)) == {"b:1"}
    known.seats(seats("a", "b"))
    assert set(picks(known)) == {"b:1"}
    assert [errand.replica.name for errand in known.errands() if not errand.locate] == ["a"]
    known.probed(by_name(known, "a"), "a")
    assert set(picks(known)) == {"a:1", "b:1"}


def test_a_silent_given_address_is_left_alone_at_once(clock: Clock) -> None:
    known = replicas(clock)
    known.nobody_tells()
    known.failed(known.given, silent=True)
    assert known.hopeless
    clock.now += 1
    (probe,) = [errand for errand in known.errands() if not errand.locate]
    assert probe.deep


def test_a_restarted_replica_at_the_same_address_is_another_one(clock: Clock) -> None:
    known = replicas(clock)
    served(known, "a", "b")
    known.failed(by_name(known, "a"))
    known.seats([Seat("a2", "a:1", 0.0), Seat("b", "b:1", 0.0)])
    assert [errand.replica.name for errand in known.errands() if not errand.locate] == ["a2"]


def test_a_paused_replica_is_taken_only_if_there_is_no_other(clock: Clock) -> None:
    known = replicas(clock)
    served(known, "a", "b")
    a, b = by_name(known, "a"), by_name(known, "b")
    known.pause(a, 2.0)
    assert set(picks(known)) == {"b:1"}
    known.pause(b, 2.0)
    assert set(picks(known)) == {"a:1", "b:1"}
    known.given.paused_until = 1000.0
    assert not known.elsewhere(())
    clock.now += 2
    assert known.elsewhere(())


def test_a_given_address_that_is_a_replica_is_known_as_one(clock: Clock) -> None:
    known = replicas(clock)
    known.seats([Seat("g", "given:1", 0.0), *seats("a")])
    assert set(picks(known)) == {"given:1"}, "it was reached already"
    known.probed(by_name(known, "a"), "a")
    assert set(picks(known)) == {"given:1", "a:1"}
    assert len(known.all) == 2
    known.failed(known.given)
    assert set(picks(known)) == {"a:1"}, "one failure is enough where there are others"


def test_the_given_address_alone_is_used_whatever_happens(clock: Clock) -> None:
    known = replicas(clock)
    known.nobody_tells()
    for failures in range(5):
        assert known.choose((known.given,)) is known.given
        assert known.hopeless is (failures >= 3)
        known.failed(known.given)
    known.probed(known.given, "whoever")
    assert not known.hopeless


def test_an_address_of_several_hosts_stays_where_each_server_knows_only_itself(clock: Clock) -> None:
    known = replicas(clock, spread=True)
    known.seats(seats("a"))
    assert set(picks(known)) == {"given:1"}
    assert known.elsewhere((known.given,)), "the next attempt may meet another host"
    served(known, "a", "b")
    assert set(picks(known)) == {"a:1", "b:1"}


def test_one_client_calls_a_part_of_a_large_fleet_and_always_the_same(clock: Clock) -> None:
    fleet = [f"r{number}" for number in range(1000)]
    known = replicas(clock)
    served(known, *fleet)
    part = {replica.name for replica in known.all} - {None}
    assert len(part) == MAX_REPLICAS
    served(known, *fleet[:-1], "new")
    again = {replica.name for replica in known.all} - {None}
    assert len(part & again) >= MAX_REPLICAS - 2
    spread = Counter(
        replica.name
        for seed in range(300)
        for replica in (lambda one: (served(one, *fleet), one.all)[1])(replicas(clock, seed=seed))
    )
    del spread[None]
    assert max(spread.values()) < 20, "300 clients meet 1,000 replicas evenly: 4.8 each"


def test_lost_replicas_of_a_large_fleet_are_replaced_and_remembered(clock: Clock) -> None:
    fleet = [f"r{number}" for number in range(100)]
    known = replicas(clock)
    served(known, *fleet)
    lost = [replica for replica in known.all if replica.name][:5]
    for replica in lost:
        known.failed(replica)
    served(known, *fleet)
    assert sum(replica.breaker.closed for replica in known.all if replica.name) == MAX_REPLICAS
    assert all(replica in known.all for replica in lost)


@pytest.mark.parametrize(
    ("replica", "address", "near"),
    [
        ("box-1a2b", "10.0.0.1:5", True),
        ("boxer-1a2b", "10.0.0.1:5", False),
        ("x-1", "box:5", True),
        ("x-1", "127.0.0.1:5", False),
    ],
)
def test_near_is_who_is_named_after_this_host(monkeypatch: pytest.MonkeyPatch, replica: str, address: str, near: bool) -> None:
    monkeypatch.setattr("platform.node", lambda: "box")
    assert is_near(Seat(replica, address, 0.0)) is near
