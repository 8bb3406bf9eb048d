"""The engine: waiting layers share batches, answers are those of the library, and a failure is its own layer's alone."""

import asyncio
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from graphkv_testing.bench import Bench, answers, hold
from graphkv_testing.process import wait_until

from graphkv import Policy
from graphkv.algorithm import select_layers
from graphkv.budgets import plan_layers
from graphkv.layer import Layer
from graphkv.terms.errors import (
    DeadlineError,
    GraphKVError,
    InternalError,
    InvalidInputError,
    OverloadedError,
    UnavailableError,
)

POLICY = Policy(budget=5, scorer="knorm")


def layer(seed: int = 0, *, tokens: int = 23, heads: int = 3, index: int = 0) -> Layer:
    keys = torch.randn(heads, tokens, 7, generator=torch.Generator().manual_seed(seed))
    return Layer(plan_layers(POLICY, num_tokens=tokens, num_layers=index + 1)[index], keys)


def test_an_answer_is_the_librarys() -> None:
    bench = Bench()

    async def body() -> None:
        with bench.engine.open() as job:
            await bench.submit(job, layer(3))
            job.finish()
            (answer,) = await answers(job)
        (expected,) = select_layers([layer(3)])
        assert not isinstance(expected, InvalidInputError)
        assert answer.indices.tolist() == expected.indices.tolist()  # type: ignore[union-attr]
        assert (answer.layer, answer.num_tokens, answer.importance) == (0, 23, "knorm")
        assert answer.fingerprint == POLICY.fingerprint
        assert set(job.seconds) == {"queue", "compute"}

    bench.run(body)


def test_waiting_layers_of_one_shape_share_a_batch_whoever_sent_them() -> None:
    bench = Bench()

    async def body() -> None:
        with bench.engine.open() as first, bench.engine.open() as second:
            await hold(bench, first, layer())
            for seed in range(3):
                await bench.submit(first, layer(seed, tokens=11 + seed))
                await bench.submit(second, layer(seed))
            await bench.submit(second, layer(heads=5))
            first.finish()
            second.finish()
            bench.release.set()
            assert [len(given) for given in await asyncio.gather(answers(first), answers(second))] == [4, 4]
        assert bench.batches == [1, 6, 1]

    bench.run(body)


def test_a_batch_is_bounded_in_bytes() -> None:
    bench = Bench(max_batch_bytes=2500)

    async def body() -> None:
        with bench.engine.open() as job:
            await hold(bench, job, layer())
            for seed in range(5):
                await bench.submit(job, layer(seed))
            job.finish()
            bench.release.set()
            assert len(await answers(job)) == 6
        assert bench.batches == [1, 2, 2, 1]

    bench.run(body)


def test_a_bad_layer_fails_its_own_call_and_names_layer_head_and_token() -> None:
    bench = Bench()

    async def body() -> None:
        with bench.engine.open() as good, bench.engine.open() as bad:
            await hold(bench, good, layer())
            await bench.submit(good, layer(1))
            broken = layer(2, index=2)
            broken.keys[1, 4, 0] = float("nan")
            await bench.submit(bad, broken, prompt=1)
            good.finish()
            bad.finish()
            bench.release.set()
            assert len(await answers(good)) == 2
            with pytest.raises(InvalidInputError, match=r"prompt 1: .*layer 2, KV head 1, token 4") as caught:
                await answers(bad)
            assert caught.value.reason == "NON_FINITE"

    bench.run(body)


def fails_where_seed_is(error: BaseException, *, above: int) -> Callable[[Sequence[Any]], None]:
    """Breaks every batch that has a layer of more tokens than `above`."""

    def broken(work: Sequence[Any]) -> None:
        if any(item.plan.num_tokens > above for item in work):
            raise error

    return broken


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), OverloadedError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"), OverloadedError),
        (ZeroDivisionError("a bug"), InternalError),
    ],
    ids=["CUDA", "CPU", "bug"],
)
def test_what_breaks_a_batch_fails_one_call_alone(error: Exception, expected: type[GraphKVError]) -> None:
    bench = Bench(broken=fails_where_seed_is(error, above=40))

    async def body() -> None:
        with bench.engine.open() as good, bench.engine.open() as bad:
            await hold(bench, good, layer())
            for _ in range(4):
                await bench.submit(good, layer())
            await bench.submit(bad, layer(tokens=41))
            good.finish()
            bad.finish()
            bench.release.set()
            assert len(await answers(good)) == 5
            with pytest.raises(expected):
                await answers(bad)

    bench.run(body)


def test_a_batch_too_large_for_the_device_is_halved() -> None:
    def broken(work: Sequence[Any]) -> None:
        if len(work) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    bench = Bench(broken=broken)

    async def body() -> None:
        with bench.engine.open() as job:
            await hold(bench, job, layer())
            for seed in range(5):
                await bench.submit(job, layer(seed))
            job.finish()
            bench.release.set()
            assert len(await answers(job)) == 6
        assert bench.batches == [1, 5, 2, 3, 1, 2]

    bench.run(body)


class Tensors:
    """What a launch allocates, as far as its lifetime goes."""


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, ZeroDivisionError], ids=["memory", "bug"])
def test_what_a_failed_launch_allocated_is_gone_before_the_next(error: type[Exception]) -> None:
    launches: list[weakref.ref[Tensors]] = []
    alive: list[int] = []

    def broken(work: Sequence[Any]) -> None:
        alive.append(sum(launch() is not None for launch in launches))
        allocated = Tensors()
        launches.append(weakref.ref(allocated))
        if len(work) > 1:
            raise error("no")

    bench = Bench(broken=broken)

    async def body() -> None:
        with bench.engine.open() as job:
            await hold(bench, job, layer())
            for seed in range(4):
                await bench.submit(job, layer(seed))
            job.finish()
            bench.release.set()
            assert len(await answers(job)) == 5
        assert len(alive) > 5
        assert set(alive) == {0}

    bench.run(body)


def test_a_failure_does_not_wait_behind_answers_that_nobody_took() -> None:
    bench = Bench()

    async def body() -> None:
        with bench.engine.open() as job:
            for seed in range(3):
                await bench.submit(job, layer(seed))
            results = job.results()
            await anext(results)
            assert await asyncio.to_thread(wait_until, lambda: sum(bench.batches) == 3)
            job.fail(UnavailableError("first"))
            job.fail(UnavailableError("second"))
            with pytest.raises(UnavailableError, match="first"):
                await anext(results)
            await bench.submit(job, layer())
            # Also what was computed meanwhile comes back.
            assert await asyncio.to_thread(wait_until, lambda: not bench.admission.bytes_in_flight)

    bench.run(body)


def test_a_deadline_that_has_passed_costs_no_work() -> None:
    bench = Bench()

    async def body() -> None:
        with bench.engine.open(0.0) as job:
            await bench.submit(job, layer())
            with pytest.raises(DeadlineError) as caught:
                await answers(job)
            assert caught.value.reason == "EXPIRED"
        assert bench.batches == []
        assert bench.metrics.registry.get_sample_value("graphkv_expired_before_start_total") == 1

    bench.run(body)


def test_a_caller_who_left_is_not_computed_and_holds_nothing() -> None:
    bench = Bench()

    async def body() -> None:
        with bench.engine.open() as stayer:
            with bench.engine.open() as leaver:
                await hold(bench, leaver, layer())
                await bench.submit(leaver, layer())
                await bench.submit(stayer, layer())
            assert bench.admission.bytes_in_flight == 2000  # one is being computed, one is the stayer's
            stayer.finish()
            bench.release.set()
            assert len(await answers(stayer)) == 1
        assert bench.batches == [1, 1]

    bench.run(body)


def test_unsent_answers_take_their_own_room_only() -> None:
    bench = Bench()

    async def body() -> None:
        with bench.engine.open() as job:
            await bench.submit(job, layer())
            job.finish()
            results = job.results()
            answer = await anext(results)
            assert bench.admission.bytes_in_flight == answer.indices.nbytes == 3 * 5 * 4
            with pytest.raises(StopAsyncIteration):
                await anext(results)
            assert bench.admission.bytes_in_flight == 0

    bench.run(body)
