"""Layers that wait for all of their prompt: budgets found over whole ones, parts joined to one answer; and however it ends,
at whichever step, everything comes back.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from graphkv_server.engine import engine as engine_module
from graphkv_server.engine.batcher import Allocation, Joining, Task, take_batch
from graphkv_server.rooms import part_bytes
from graphkv_testing.bench import Bench, answers, hold
from graphkv_testing.forms import POLICIES, library, outputs_of
from graphkv_testing.process import wait_until
from graphkv_testing.raw import RawCall

from graphkv import Policy
from graphkv.algorithm import Part
from graphkv.budgets import plan_layers
from graphkv.layer import Layer
from graphkv.terms.errors import DeadlineError, GraphKVError, InternalError, InvalidInputError, OverloadedError

LAYERS = 3
CALL = RawCall(layers=LAYERS, window=2)
WAITING = {"cake": POLICIES["cake"], "model": POLICIES["pages of a model"]}
both = pytest.mark.parametrize("kind", WAITING)


def layers(policy: Policy, call: RawCall = CALL, outputs: Sequence[str] = ()) -> list[Layer]:
    plans = plan_layers(policy, num_tokens=call.tokens, num_layers=call.layers, outputs=outputs)
    tensors = zip(torch.from_numpy(call.keys), torch.from_numpy(call.queries), strict=True)
    return [Layer(plan, keys, queries) for plan, (keys, queries) in zip(plans, tensors, strict=True)]


async def submit_all(bench: Bench, job: Any, works: Sequence[Layer], *, prompt: int = 0) -> None:
    for work in works:
        await bench.submit(job, work, prompt=prompt, size=5000, layers=LAYERS)


async def until(condition: Callable[[], bool]) -> None:
    assert await asyncio.to_thread(wait_until, condition)


@both
def test_an_answer_is_the_librarys_whatever_order_layers_come_in(kind: str) -> None:
    bench, policy = Bench(), WAITING[kind]
    calls = [RawCall(layers=LAYERS, window=2, seed=seed) for seed in (1, 2)]

    async def body() -> None:
        with bench.engine.open() as job:
            first, second = (layers(policy, call) for call in calls)
            for prompt, work in ((0, first[2]), (1, second[0]), (0, first[0]), (1, second[2]), (1, second[1]), (0, first[1])):
                await bench.submit(job, work, prompt=prompt, size=5000, layers=LAYERS)
            job.finish()
            got = {(answer.prompt, answer.layer): answer for answer in await answers(job)}
        for prompt, call in enumerate(calls):
            for expected in library(policy, call).layers:
                answer = got.pop((prompt, expected.layer))
                for row, own in zip(answer.rows, expected.rows, strict=True):
                    np.testing.assert_array_equal(row, own)
                assert (answer.changed, answer.kept_score_ratio) == (expected.changed, expected.kept_score_ratio)
                assert (answer.granularity, answer.page_size) == (policy.granularity, policy.page_size)
        assert not got

    bench.run(body)


@pytest.mark.parametrize("name", POLICIES)
def test_answers_and_outputs_hold_nothing_of_the_memory_that_goes_back(name: str) -> None:
    """The bench overwrites what a lease gives back, which a layer's does before its answer is read."""
    bench, policy = Bench(), POLICIES[name]
    outputs = outputs_of(policy)

    async def body() -> None:
        with bench.engine.open() as job:
            for work in layers(policy, outputs=outputs):
                await bench.submit(job, work, size=20000, layers=LAYERS if policy.needs_all_layers else 1)
            job.finish()
            got = {answer.layer: answer for answer in await answers(job)}
        for expected in library(policy, CALL, outputs).layers:
            answer = got[expected.layer]
            assert list(answer.outputs) == list(outputs)
            for row, own in zip(answer.rows, expected.rows, strict=True):
                np.testing.assert_array_equal(row, own)
            for output in outputs:
                np.testing.assert_array_equal(answer.outputs[output], expected.outputs[output], strict=True)

    bench.run(body)


def test_a_part_takes_its_own_room_only_and_the_answer_its_own() -> None:
    bench, policy = Bench(), WAITING["model"]

    async def body() -> None:
        with bench.engine.open() as job:
            works = layers(policy)
            await submit_all(bench, job, works[:2])
            plan = works[0].plan
            room = part_bytes(plan, Part.bytes_for(plan.num_tokens), layers=LAYERS)
            assert room < 5000
            await until(lambda: bench.admission.bytes_in_flight <= 2 * room)
            assert bench.admission.bytes_in_flight > 0
            await submit_all(bench, job, works[2:])
            job.finish()
            results = job.results()
            answer = await anext(results)
            assert bench.admission.bytes_in_flight == answer.indices.nbytes
            with pytest.raises(StopAsyncIteration):
                await anext(results)
            assert bench.admission.bytes_in_flight == 0

    bench.run(body)


def test_budgets_are_found_once_all_layers_are_there_and_then_they_share_a_batch() -> None:
    bench, policy = Bench(), WAITING["cake"]

    async def body() -> None:
        with bench.engine.open() as job:
            works = layers(policy)
            await submit_all(bench, job, works[:2])
            await asyncio.sleep(0.05)
            assert bench.batches == []
            await submit_all(bench, job, works[2:])
            job.finish()
            assert len(await answers(job)) == LAYERS
        assert bench.batches == [LAYERS]

    bench.run(body)


@both
@pytest.mark.parametrize("moment", ["not all have come", "a step waits", "a step is computed"])
def test_a_caller_who_leaves_holds_nothing(kind: str, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, policy = Bench(), WAITING[kind]
    slow = Slow(monkeypatch, bench)

    async def body() -> None:
        with bench.engine.open() as job:
            works = layers(policy)
            if moment == "not all have come":
                await submit_all(bench, job, works[:-1])
                await until(lambda: sum(bench.batches) == (2 if kind == "model" else 0))
            elif moment == "a step waits":
                with bench.engine.open() as other:
                    await hold(bench, other, layers(POLICIES["heads"])[0])
                    await submit_all(bench, job, works)
            else:
                await submit_all(bench, job, works)
                assert await asyncio.to_thread(slow.started.wait, 30)
            assert bench.admission.bytes_in_flight > 0
        if moment != "a step is computed":
            await until(lambda: bench.admission.bytes_in_flight <= (1000 if moment == "a step waits" else 0))

    bench.run(body)


class Slow:
    """Steps over all layers take until the bench is released; `started` is set when one begins."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bench: Bench) -> None:
        self.started = bench.started
        for name in ("allocate", "finish"):
            monkeypatch.setattr(engine_module, name, self._slowly(getattr(engine_module, name), bench))

    def _slowly(self, step: Callable[[Any], Any], bench: Bench) -> Callable[[Any], Any]:
        def slowly(given: Any) -> Any:
            bench.release.clear()
            self.started.set()
            bench.release.wait(0.2)
            return step(given)

        return slowly


@both
@pytest.mark.parametrize(
    ("error", "expected"),
    [(torch.OutOfMemoryError("CUDA out of memory"), OverloadedError), (ZeroDivisionError("a bug"), InternalError)],
    ids=["memory", "bug"],
)
def test_a_step_that_breaks_fails_its_own_call_alone(
    kind: str, error: Exception, expected: type[GraphKVError], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench()

    def broken(given: Any) -> Any:
        raise error

    for name in ("allocate", "finish"):
        monkeypatch.setattr(engine_module, name, broken)

    async def body() -> None:
        with bench.engine.open() as good, bench.engine.open() as bad:
            await submit_all(bench, bad, layers(WAITING[kind]))
            await bench.submit(good, layers(POLICIES["heads"])[0])
            good.finish()
            bad.finish()
            assert len(await answers(good)) == 1
            with pytest.raises(expected):
                await answers(bad)
            assert bench.admission.bytes_in_flight == 0

    bench.run(body)


@both
def test_a_launch_too_large_for_the_device_is_halved_and_still_answers(kind: str) -> None:
    def broken(work: Sequence[Any]) -> None:
        if len(work) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    bench = Bench(broken=broken)

    async def body() -> None:
        with bench.engine.open() as job:
            await hold(bench, job, layers(POLICIES["heads"])[0], prompt=1)
            await submit_all(bench, job, layers(WAITING[kind]))
            job.finish()
            bench.release.set()
            got = [answer for answer in await answers(job) if answer.prompt == 0]
        expected = library(WAITING[kind], CALL).layers
        assert len(got) == len(expected)
        np.testing.assert_array_equal(got[0].indices, expected[got[0].layer].indices)

    bench.run(body)


@both
def test_one_bad_layer_fails_the_call_and_nothing_waits_for_it_any_more(kind: str) -> None:
    bench = Bench()

    async def body() -> None:
        with bench.engine.open() as job:
            works = layers(WAITING[kind])
            broken = works[1].queries
            assert broken is not None
            works[1] = Layer(works[1].plan, works[1].keys, broken * torch.nan)
            await submit_all(bench, job, works, prompt=1)
            with pytest.raises(InvalidInputError, match=r"prompt 1: .*layer 1") as caught:
                await answers(job)
            assert caught.value.reason == "NON_FINITE"
            await until(lambda: not bench.admission.bytes_in_flight)
            await submit_all(bench, job, works[:1])
            assert bench.admission.bytes_in_flight == 0

    bench.run(body)


@both
def test_a_deadline_that_passes_before_the_step_costs_no_more_work(kind: str) -> None:
    bench = Bench()

    async def body() -> None:
        with bench.engine.open() as job:
            works = layers(WAITING[kind])
            if kind == "model":
                await submit_all(bench, job, works[:2])
                await hold(bench, job, works[2], size=5000, layers=LAYERS)
                job.deadline = 0.0
                bench.release.set()
            else:
                job.deadline = 0.0
                await submit_all(bench, job, works)
            with pytest.raises(DeadlineError) as caught:
                await answers(job)
            assert caught.value.reason == "EXPIRED"
        expired = bench.metrics.registry.get_sample_value("graphkv_expired_before_start_total")
        assert expired == (LAYERS if kind == "cake" else 0)

    bench.run(body)


def test_a_step_over_all_layers_is_a_batch_of_its_own() -> None:
    heads, cake = layers(POLICIES["heads"]), layers(WAITING["cake"])
    tasks = [Task(None, work, None, 0, 10) for work in heads]
    step = Allocation(None, [Task(None, work, None, 0, 10) for work in cake], 0)
    join = Joining(None, [], [], 0)
    waiting: list[Any] = [tasks[0], step, tasks[1], join, tasks[2]]
    assert take_batch(waiting, 20) == tasks[:2]
    assert take_batch(waiting, 20) == [step]
    assert take_batch(waiting, 20) == [join]
    assert take_batch(waiting, 20) == tasks[2:]
    assert (step.rows, join.rows) == (6, 0)
