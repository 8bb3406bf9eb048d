"""AsyncFleet: the twin of `_fleet.Fleet` for asyncio. No lock: everything is in one event loop, questions are tasks."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
from graphkv_proto import messages

from graphkv.terms.errors import GraphKVError
from graphkv_client._attempts import Attempt, Attempts
from graphkv_client._channel import closed_error, is_spread, open_aio_channel
from graphkv_client._fleet import FIRST_PROBES, LINGER, TICK, Line
from graphkv_client._probe import QUESTION_TIMEOUT, Work, replica_of, seats_of
from graphkv_client._replicas import Errand, Replica
from graphkv_client._retry import Tries
from graphkv_client.options import ClientOptions

__all__ = ["AsyncFleet"]


class AsyncFleet:
    """Of one client; close it. Belongs to the event loop of its first call."""

    def __init__(self, options: ClientOptions) -> None:
        self._options = options
        self._attempts = Attempts(options)
        self._lines: dict[str, Line] = {}
        self._questions: set[asyncio.Task[None]] = set()
        self._watcher: asyncio.TimerHandle | None = None
        self._last_call = 0.0
        self.closed = False

    async def close(self) -> None:
        """Ends the connections and the calls that still run."""
        self.closed = True
        if self._watcher is not None:
            self._watcher.cancel()
        tasks = [task for task in self._questions if not task.done()]
        for task in tasks:
            task.cancel()
        lines, self._lines = list(self._lines.values()), {}
        for line in lines:
            await line.channel.close()
        if tasks:
            await asyncio.wait(tasks)

    async def call(self, limit: float) -> Tries:
        """A call that begins; the first of all finds out who serves."""
        self._check_open()
        call = self._attempts.call(limit)
        self._last_call = time.monotonic()
        if self._watcher is None:
            self._watcher = asyncio.get_running_loop().call_later(TICK, self._watch)
        if not self._attempts.replicas.located:
            await self._find_out(call)
        return call

    @contextmanager
    def attempt(self, call: Tries) -> Iterator[Attempt]:
        """The call's next attempt. An error that leaves the block is what became of it."""
        self._check_open()
        attempt = self._attempts.begin(call, self._line)
        error: BaseException | None = None
        try:
            yield attempt
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._attempts.ended(attempt, error)

    async def again(
        self, call: Tries, error: GraphKVError, attempt: Attempt | None, left: Callable[[], bool] = lambda: False
    ) -> bool:
        """Whether the call that failed is to be sent again; comes back when it is time. `left`: whether nobody waits for it."""
        pause = self._attempts.pause(call, error, attempt)
        if pause is None:
            return False
        end = time.monotonic() + pause
        while not self.closed and not left() and (remaining := end - time.monotonic()) > 0:  # noqa: ASYNC110  # two may end it
            await asyncio.sleep(min(remaining, TICK))
        return not self.closed and not left()

    def patience(self, attempt: Attempt) -> float:
        """Seconds that a question may take which a replica answers at once."""
        return self._attempts.patience(attempt)

    def unanswered(self, attempt: Attempt, error: GraphKVError) -> GraphKVError:
        """What an error of such a question means."""
        return self._attempts.unanswered(attempt, error)

    def fell_back(self) -> None:
        """A call was answered without the service."""
        if self._options.metrics is not None:
            self._options.metrics.fell_back(self._options.on_unavailable)

    def _line(self, replica: Replica) -> Line:
        line = self._lines.get(replica.address)
        if line is None:
            line = self._lines[replica.address] = Line(open_aio_channel(replica.address))
        return line

    async def _find_out(self, call: Tries) -> None:
        """Locate, and probes of whom it names; waits for the first that answers, and not long."""
        replicas = self._attempts.replicas
        replicas.spread = await asyncio.to_thread(is_spread, self._options.address)
        self._run_errands()
        await self._until(lambda: replicas.located, min(QUESTION_TIMEOUT, call.limit / 4))
        replicas.located = True  # whoever comes next does not wait again
        self._run_errands()
        await self._until(lambda: replicas.ready, min(FIRST_PROBES, call.limit / 4))

    async def _until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Waits for answers that make it true."""
        end = time.monotonic() + seconds
        while not self.closed and not condition() and self._questions and (remaining := end - time.monotonic()) > 0:
            await asyncio.wait(self._questions, timeout=remaining, return_when=asyncio.FIRST_COMPLETED)
        self._check_open()

    def _watch(self) -> None:
        """Again and again while there are calls: questions that are due, and calls that do not move."""
        self._watcher = None
        if self.closed or not (self._attempts.running or time.monotonic() - self._last_call < LINGER):
            return
        for attempt in self._attempts.look():
            self._ask(self._whether_there(attempt))
        for line in self._unused():
            self._ask(line.channel.close())
        self._run_errands()
        self._watcher = asyncio.get_running_loop().call_later(TICK, self._watch)

    def _run_errands(self) -> None:
        if self.closed:
            return
        for errand in self._attempts.replicas.errands():
            line = self._line(errand.replica)
            self._ask(self._who_serves(line) if errand.locate else self._probe(errand, line))

    def _ask(self, question: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(question, name="graphkv-question")
        self._questions.add(task)
        task.add_done_callback(self._questions.discard)

    async def _who_serves(self, line: Line) -> None:
        replicas = self._attempts.replicas
        try:
            replicas.seats(seats_of(await line.locate(messages.write_locate_request(), timeout=QUESTION_TIMEOUT)))
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                replicas.nobody_tells()
            else:
                replicas.not_told()
        except (grpc.aio.UsageError, asyncio.CancelledError):  # the channel was closed meanwhile
            replicas.not_told()

    async def _probe(self, errand: Errand, line: Line) -> None:
        name = None
        try:
            name = await (self._worker(errand, line) if errand.deep else self._who(line))
        except (grpc.RpcError, GraphKVError, grpc.aio.UsageError, asyncio.CancelledError):
            name = None
        finally:
            self._attempts.replicas.probed(errand.replica, name)

    async def _who(self, line: Line) -> str | None:
        return replica_of(await line.capabilities(messages.write_capabilities_request(), timeout=QUESTION_TIMEOUT))

    async def _worker(self, errand: Errand, line: Line) -> str | None:
        work = Work()
        try:
            async for response in line.select(iter(list(work.requests())), timeout=QUESTION_TIMEOUT):
                work.fold(response)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:  # who refuses for load is there
                return errand.replica.name or ""
            raise
        return work.replica()

    async def _whether_there(self, attempt: Attempt) -> None:
        try:
            if await self._who(attempt.line) is not None:
                attempt.progress.there()
        except (grpc.RpcError, grpc.aio.UsageError, asyncio.CancelledError):
            return

    def _unused(self) -> list[Line]:
        """Lines to replicas that serve no more, taken out."""
        used = {replica.address for replica in self._attempts.replicas.all}
        used |= {attempt.replica.address for attempt in self._attempts.running}
        return [self._lines.pop(address) for address in list(self._lines) if address not in used]

    def _check_open(self) -> None:
        if self.closed:
            raise closed_error("client")
