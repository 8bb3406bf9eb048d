"""Fleet: a synchronous client's channels, one a replica, and the thread that asks the questions that are due.

The thread lives only while there are calls, and a few seconds longer. What to ask, where a call goes and whether it goes
again is decided in `_attempts`; `aio_fleet` is the twin for asyncio.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import grpc
from graphkv_proto import messages, service

from graphkv.terms.errors import GraphKVError
from graphkv_client._attempts import Attempt, Attempts
from graphkv_client._channel import closed_error, is_spread, open_channel
from graphkv_client._probe import QUESTION_TIMEOUT, Work, replica_of, seats_of
from graphkv_client._replicas import Errand, Replica
from graphkv_client._retry import Tries
from graphkv_client.options import ClientOptions

__all__ = ["FIRST_PROBES", "LINGER", "TICK", "Fleet", "Line"]

TICK = 0.1
"""Seconds between two looks at the calls."""
LINGER = 5.0
"""Seconds after the last call for which replicas are still followed."""
FIRST_PROBES = 0.5
"""Seconds that the first call waits for a replica to be reached."""


class Line:
    """The way to one address: its channel, and what can be called there."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self.select = service.multicallable(channel, service.SELECT)
        self.capabilities = service.multicallable(channel, service.GET_CAPABILITIES)
        self.locate = service.multicallable(channel, service.LOCATE)


class Fleet:
    """Of one client; close it. May be used from several threads at once."""

    def __init__(self, options: ClientOptions) -> None:
        self._options = options
        self._changed = threading.Condition()  # guards all below
        self._attempts = Attempts(options)
        self._lines: dict[str, Line] = {}
        self._watcher: threading.Thread | None = None
        self._last_call = 0.0
        self._first = threading.Lock()  # held while the first call finds out who serves
        self.closed = False

    def close(self) -> None:
        """Ends the connections and the calls that still run."""
        with self._changed:
            self.closed = True
            lines, self._lines = list(self._lines.values()), {}
            self._changed.notify_all()
        for line in lines:
            line.channel.close()

    def call(self, limit: float) -> Tries:
        """A call that begins; the first of all finds out who serves."""
        with self._changed:
            self._check_open()
            call = self._attempts.call(limit)
            self._last_call = time.monotonic()
            located = self._attempts.replicas.located
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, name="graphkv-replicas", daemon=True)
                self._watcher.start()
        if not located:
            self._find_out(call)
        return call

    @contextmanager
    def attempt(self, call: Tries) -> Iterator[Attempt]:
        """The call's next attempt. An error that leaves the block is what became of it."""
        with self._changed:
            self._check_open()
            attempt = self._attempts.begin(call, self._line)
        error: BaseException | None = None
        try:
            yield attempt
        except BaseException as raised:
            error = raised
            raise
        finally:
            with self._changed:
                self._attempts.ended(attempt, error)

    def again(
        self, call: Tries, error: GraphKVError, attempt: Attempt | None, left: Callable[[], bool] = lambda: False
    ) -> bool:
        """Whether the call that failed is to be sent again; comes back when it is time. `left`: whether nobody waits for it."""
        with self._changed:
            pause = self._attempts.pause(call, error, attempt)
            if pause is None:
                return False
            end = time.monotonic() + pause
            while not self.closed and not left() and (remaining := end - time.monotonic()) > 0:
                self._changed.wait(min(remaining, TICK))
            return not self.closed and not left()

    def patience(self, attempt: Attempt) -> float:
        """Seconds that a question may take which a replica answers at once."""
        return self._attempts.patience(attempt)

    def unanswered(self, attempt: Attempt, error: GraphKVError) -> GraphKVError:
        """What an error of such a question means."""
        with self._changed:
            return self._attempts.unanswered(attempt, error)

    def fell_back(self) -> None:
        """A call was answered without the service."""
        if self._options.metrics is not None:
            self._options.metrics.fell_back(self._options.on_unavailable)

    def _line(self, replica: Replica) -> Line:
        line = self._lines.get(replica.address)
        if line is None:
            line = self._lines[replica.address] = Line(open_channel(replica.address))
        return line

    def _find_out(self, call: Tries) -> None:
        """Locate, and probes of whom it names; waits for the first that answers, and not long."""
        replicas = self._attempts.replicas
        with self._first:
            if replicas.located:
                return
            replicas.spread = is_spread(self._options.address)
            self._run_errands()
            self._wait(lambda: replicas.located, min(QUESTION_TIMEOUT, call.limit / 4))
            with self._changed:
                replicas.located = True  # whoever comes next does not wait again
            self._run_errands()
            self._wait(lambda: replicas.ready, min(FIRST_PROBES, call.limit / 4))

    def _wait(self, condition: Callable[[], bool], seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.closed or condition(), seconds)
            self._check_open()

    def _watch(self) -> None:
        """The thread: questions that are due, and calls that do not move."""
        while True:
            with self._changed:
                self._changed.wait(TICK)
                idle = not self._attempts.running and time.monotonic() - self._last_call > LINGER
                if self.closed or idle:
                    self._watcher = None
                    return
                silent = self._attempts.look()
                unused = self._unused()
            for line in unused:
                line.channel.close()
            for attempt in silent:
                self._ask(attempt.line.capabilities, messages.write_capabilities_request(), partial(_note_there, attempt))
            self._run_errands()

    def _run_errands(self) -> None:
        """Asks what is due; the answers come on gRPC's threads."""
        with self._changed:
            if self.closed:
                return
            due = [(errand, self._line(errand.replica)) for errand in self._attempts.replicas.errands()]
        for errand, line in due:
            if errand.locate:
                self._ask(line.locate, messages.write_locate_request(), self._located)
            elif errand.deep:
                work = threading.Thread(target=self._try_work, args=(errand, line), name="graphkv-probe", daemon=True)
                work.start()
            else:
                told = partial(self._probed, errand)
                self._ask(line.capabilities, messages.write_capabilities_request(), told)

    def _ask(self, method: Any, request: Any, told: Callable[[Any, grpc.StatusCode | None], None]) -> None:
        """Sends a question; `told` gets the answer, or None and the status, holding the lock."""

        def heard(future: Any) -> None:
            code = future.code()
            with self._changed:
                told(future.result() if code is grpc.StatusCode.OK else None, code)
                self._changed.notify_all()

        try:
            method.future(request, timeout=QUESTION_TIMEOUT).add_done_callback(heard)
        except ValueError:  # the channel was closed meanwhile
            with self._changed:
                told(None, None)

    def _located(self, answer: Any, code: grpc.StatusCode | None) -> None:
        replicas = self._attempts.replicas
        if answer is not None:
            replicas.seats(seats_of(answer))
        elif code is grpc.StatusCode.UNIMPLEMENTED:
            replicas.nobody_tells()
        else:
            replicas.not_told()

    def _probed(self, errand: Errand, answer: Any, code: grpc.StatusCode | None) -> None:
        self._attempts.replicas.probed(errand.replica, None if answer is None else replica_of(answer))

    def _try_work(self, errand: Errand, line: Line) -> None:
        """A probe that does work, on a thread of its own: such are rare."""
        name, work = None, Work()
        try:
            for response in line.select(work.requests(), timeout=QUESTION_TIMEOUT):
                work.fold(response)
            name = work.replica()
        except (grpc.RpcError, GraphKVError, ValueError) as error:
            refused = isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            name = errand.replica.name or "" if refused else None  # who refuses for load is there
        with self._changed:
            self._attempts.replicas.probed(errand.replica, name)

    def _unused(self) -> list[Line]:
        """Lines to replicas that serve no more, taken out."""
        used = {replica.address for replica in self._attempts.replicas.all}
        used |= {attempt.replica.address for attempt in self._attempts.running}
        return [self._lines.pop(address) for address in list(self._lines) if address not in used]

    def _check_open(self) -> None:
        if self.closed:
            raise closed_error("client")


def _note_there(attempt: Attempt, answer: Any, code: grpc.StatusCode | None) -> None:
    if answer is not None:
        attempt.progress.there()
