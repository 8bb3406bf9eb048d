"""Who is alive, by probes that are answered or not: lost, back, draining, forgotten; and who is named for a group."""

import random

from graphkv_server.directory import Seat, SingleReplica, least_loaded, rendezvous
from graphkv_server.ray.watch import FORGET_AFTER, MISSES, Watch
from hypothesis import given
from hypothesis import strategies as st

OWN = "10.0.0.1:1"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def seat(number: int, *, held: int = 0, serving: bool = True, draining: bool = False) -> Seat:
    return Seat(f"r{number}", f"10.0.0.{number}:1", held, 100, serving=serving, draining=draining)


def watch(clock: Clock | None = None, **fields: int) -> Watch:
    return Watch(OWN, clock or Clock(), random_=random.Random(1), **fields)


def names(seats: list[Seat]) -> list[str]:
    return [one.replica for one in seats]


def test_who_answers_is_named_the_least_loaded_first() -> None:
    own = watch()
    for one in (seat(2, held=50), seat(3, held=10)):
        own.answered(one.address, one, [])
    assert names(own.seats(seat(1, held=20))) == ["r3", "r1", "r2"]


def test_an_address_alone_is_nobody_until_it_answers() -> None:
    own = watch()
    own.learn(["10.0.0.2:1", OWN, ""])
    assert own.to_probe() == ["10.0.0.2:1"]
    assert own.seats(None) == []


def test_others_are_learned_from_answers() -> None:
    own = watch()
    own.answered("10.0.0.2:1", seat(2), ["10.0.0.3:1", OWN])
    assert own.to_probe() == ["10.0.0.2:1", "10.0.0.3:1"]


def test_who_refuses_is_lost_at_once_and_back_with_the_next_answer() -> None:
    own, other = watch(), seat(2)
    own.answered(other.address, other, [])
    own.failed(other.address, refused=True)
    assert own.seats(None) == []
    assert own.to_probe() == [other.address], "it is asked again"
    own.answered(other.address, other, [])
    assert own.seats(None) == [other]


def test_who_is_silent_is_lost_after_some_probes() -> None:
    own, other = watch(), seat(2)
    own.answered(other.address, other, [])
    for _ in range(MISSES - 1):
        own.failed(other.address, refused=False)
        assert own.seats(None) == [other]
    own.failed(other.address, refused=False)
    assert own.seats(None) == []


def test_who_was_frozen_itself_loses_nobody() -> None:
    clock = Clock()
    own, other = watch(clock), seat(2)
    own.answered(other.address, other, [])
    clock.now += 10 * FORGET_AFTER
    own.failed(other.address, refused=False)  # the probe that was under way
    assert own.seats(None) == [other]
    assert own.forget() == []


def test_who_drains_is_never_named() -> None:
    own = watch()
    own.answered("10.0.0.2:1", seat(2, serving=False, draining=True), [])
    assert own.seats(seat(1, serving=False, draining=True)) == []


def test_who_does_not_serve_is_named_only_where_nobody_does() -> None:
    own = watch()
    own.answered("10.0.0.2:1", seat(2, serving=False), [])
    assert names(own.seats(seat(1))) == ["r1"]
    assert names(own.seats(seat(1, serving=False, draining=True))) == ["r2"]


def test_the_lost_are_forgotten_once_nobody_names_them() -> None:
    clock = Clock()
    own = watch(clock)
    own.answered("10.0.0.2:1", seat(2), [])
    own.failed("10.0.0.2:1", refused=True)
    clock.now = FORGET_AFTER / 2
    own.learn(["10.0.0.2:1"])
    clock.now = FORGET_AFTER * 1.4
    assert own.forget() == []
    clock.now = FORGET_AFTER * 1.6
    assert own.forget() == ["10.0.0.2:1"]
    assert own.to_probe() == []


@given(st.sets(st.integers(2, 250), min_size=20, max_size=120), st.text(max_size=8))
def test_many_are_watched_in_part_and_each_group_has_one(numbers: set[int], group: str) -> None:
    own = watch(most=16)
    everybody = [seat(number) for number in numbers]
    own.learn(one.address for one in everybody)
    assert len(own.to_probe()) == 16
    for one in everybody:
        own.answered(one.address, one, [])
    assert own.ranked(group, None) == rendezvous(group, [one.address for one in everybody])


@given(st.sets(st.integers(2, 250), min_size=2), st.text(max_size=8))
def test_an_address_that_goes_moves_its_own_groups_only(numbers: set[int], group: str) -> None:
    ranked = rendezvous(group, [str(number) for number in numbers])
    for gone in ranked[1:]:
        assert rendezvous(group, set(ranked) - {gone})[0] == ranked[0]
    assert rendezvous(group, ranked[1:])[0] == ranked[1]


def test_groups_are_spread() -> None:
    addresses = [f"10.0.0.{number}:1" for number in range(4)]
    first = [rendezvous(f"request-{number}", addresses)[0] for number in range(400)]
    assert all(60 <= first.count(address) <= 140 for address in addresses)


def test_equal_loads_come_in_any_order() -> None:
    seats = [seat(number) for number in range(2, 6)]
    first = {least_loaded(seats, random.Random(number))[0].replica for number in range(50)}
    assert first == {"r2", "r3", "r4", "r5"}


async def _single() -> tuple[list[Seat], list[Seat]]:
    directory = SingleReplica()
    before = await directory.locate("", 0)
    await directory.join(lambda: seat(1))
    return before, await directory.locate("group", 5)


def test_a_replica_without_peers_names_itself_once_it_listens() -> None:
    import asyncio

    before, after = asyncio.run(_single())
    assert (names(before), names(after)) == ([], ["r1"])
