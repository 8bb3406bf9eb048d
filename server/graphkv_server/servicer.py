"""The RPCs of graphkv.v1.Compression: decode, call, encode. What is decided is decided elsewhere.

Every way a call can end passes through `_answering`: one status, one count, one log line. Handlers re-raise
CancelledError, and write with `context.write` instead of yielding, so that a cancelled call unwinds its own blocks at once.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
from graphkv_proto import messages
from graphkv_proto import v1 as pb
from graphkv_proto.status import to_status

from graphkv.terms.capabilities import Capabilities
from graphkv.terms.errors import GraphKVError, InternalError, InvalidInputError, Reason, UnavailableError
from graphkv.terms.selection import LayerSelection, Summary
from graphkv_server import logs
from graphkv_server.admission import Admission
from graphkv_server.assembler import Assembler
from graphkv_server.directory import Directory, write_seats
from graphkv_server.engine import Engine, Job
from graphkv_server.metrics import ABANDONED, OK, Metrics
from graphkv_server.receiving import Receiver

__all__ = ["Servicer"]

Context = grpc.aio.ServicerContext[Any, Any]
Requests = AsyncIterator[pb.SelectRequest]

_DEADLINE_SLACK = 0.05
"""gRPC and we read two clocks: a cancellation so close before the deadline is the deadline's."""


class _Call:
    """What is known about a call, for its log line."""

    def __init__(self, deadline: float | None) -> None:
        self.deadline = deadline
        self.request_id = ""
        self.received = 0
        self.outcome = OK


class Servicer:
    """The handlers, for `graphkv_proto.service.generic_handler`."""

    def __init__(
        self,
        admission: Admission,
        engine: Engine,
        metrics: Metrics,
        *,
        capabilities: Capabilities,
        directory: Directory,
        stall_timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._admission = admission
        self._engine = engine
        self._metrics = metrics
        self._capabilities = capabilities
        self._directory = directory
        self._stall_timeout = stall_timeout
        self._clock = clock
        self._draining = asyncio.Event()
        self._jobs: set[Job] = set()

    def drain(self) -> None:
        """Refuses new Select calls from now on, and those that have sent nothing yet."""
        self._draining.set()

    def end_all(self) -> None:
        """Ends the calls that are still running, with UNAVAILABLE."""
        for job in self._jobs:
            job.fail(UnavailableError("the replica is shutting down", reason=Reason.DRAINING))

    async def select(self, requests: Requests, context: Context) -> None:
        """Prompts in, one message per layer out, each as soon as it is chosen, while later layers still arrive.

        However the call ends (answer, bad input, deadline, a caller who left), leaving the blocks gives back every
        buffer and queued row.
        """
        async with self._answering("Select", context) as call:
            if self._draining.is_set():
                raise UnavailableError("the replica is draining", reason=Reason.DRAINING)
            with self._admission.admit(call.deadline) as reservation, self._engine.open(call.deadline) as job:
                receiver = Receiver(requests, reservation, stall_timeout=self._stall_timeout, draining=self._draining)
                first = await receiver.first()
                if first is None or not first.HasField("header"):
                    raise InvalidInputError("the first message has no header", argument="header", reason=Reason.INCOMPLETE)
                call.request_id = logs.safe_id(first.header.request_id)
                header = messages.read_header(first.header)
                assembler = Assembler(header, reservation, job)
                feeding = asyncio.create_task(self._feed(assembler, first, receiver, job, header.encoding))
                del first  # the feeding lets go of it as soon as it is read
                self._jobs.add(job)
                try:
                    async for layer in job.results():
                        await context.write(pb.SelectResponse(layers=[messages.write_layer(layer)]))
                        self._count(layer, header)
                    summary = Summary(
                        request_id=call.request_id,
                        sent_bytes=assembler.received,
                        encoding=header.encoding,
                        transport="tcp",
                        where=self._capabilities.replica,
                        seconds=job.seconds,
                    )
                    await context.write(pb.SelectResponse(summary=messages.write_summary(summary)))
                finally:
                    self._jobs.discard(job)
                    call.received = assembler.received
                    feeding.cancel()
                    await asyncio.wait((feeding,))

    async def get_capabilities(self, request: pb.GetCapabilitiesRequest, context: Context) -> pb.GetCapabilitiesResponse:
        """What this replica can do; waits for nothing."""
        async with self._answering("GetCapabilities", context):
            return messages.write_capabilities(self._capabilities)

    async def locate(self, request: pb.LocateRequest, context: Context) -> pb.LocateResponse:
        """Which replicas to call."""
        async with self._answering("Locate", context):
            return write_seats(await self._directory.locate(request.group, request.limit))

    async def _feed(self, assembler: Assembler, first: pb.SelectRequest, receiver: Receiver, job: Job, encoding: str) -> None:
        """Reads the call's messages; whatever goes wrong ends the job with it."""
        started, counted = self._clock(), 0
        received = self._metrics.received_bytes_total.labels(encoding=encoding, transport="tcp")
        message: pb.SelectRequest | None = first
        del first  # a message is a MiB, and a call may wait long
        try:
            headers = 0
            while message is not None:
                headers += message.HasField("header")
                if headers > 1:
                    raise InvalidInputError("only the first message has a header", argument="header", reason=Reason.BAD_LAYOUT)
                await assembler.take(message)
                received.inc(assembler.received - counted)
                counted = assembler.received
                if assembler.ended and "receive" not in job.seconds:
                    job.seconds["receive"] = self._clock() - started
                    self._metrics.phase_duration_seconds.labels(phase="receive").observe(job.seconds["receive"])
                message = None
                await assembler.ready()
                message = await receiver.next(ended=assembler.ended)
            assembler.closed()
        except GraphKVError as error:
            job.fail(error)
        except Exception as error:  # noqa: BLE001  # a task's exception would be lost: the handler raises it instead
            logs.event("assembler_failed", level="error", kind=type(error).__name__, text=str(error))
            job.fail(InternalError(f"the request could not be read ({type(error).__name__})"))

    @contextlib.asynccontextmanager
    async def _answering(self, method: str, context: Context) -> AsyncIterator[_Call]:
        """One call from its start to its status: errors become statuses, endings are counted and logged."""
        started = self._clock()
        remaining = context.time_remaining()
        call = _Call(None if remaining is None else started + remaining)
        try:
            yield call
        except GraphKVError as error:
            call.outcome = error.reason
            await self._abort(context, error, call)
        except asyncio.CancelledError:
            expired = call.deadline is not None and self._clock() >= call.deadline - _DEADLINE_SLACK
            call.outcome = Reason.EXPIRED if expired else ABANDONED
            raise
        except grpc.aio.BaseError:  # the call ended under our hands: nothing can be written to it
            call.outcome = ABANDONED
            raise
        except Exception as error:  # noqa: BLE001  # the boundary: what is not ours is our mistake
            call.outcome = Reason.BUG
            logs.event("call_failed", level="error", method=method, kind=type(error).__name__, text=str(error))
            await self._abort(context, InternalError(f"the call failed ({type(error).__name__})"), call)
        finally:
            seconds = self._clock() - started
            self._metrics.ended(method, call.outcome, seconds)
            level = "debug" if method != "Select" else "info"
            logs.event(
                "call",
                level=level,
                method=method,
                outcome=str(call.outcome),
                request_id=call.request_id,
                received_bytes=call.received,
                seconds=round(seconds, 6),
            )

    async def _abort(self, context: Context, error: GraphKVError, call: _Call) -> None:
        error.request_id = call.request_id or None
        code, message, trailing = to_status(error)
        await context.abort(code, message, trailing)

    def _count(self, layer: LayerSelection, header: messages.Header) -> None:
        sharing = {"head": 1, "layer": header.kv_heads, "model": header.kv_heads * header.layers}[layer.granularity]
        kept = sum(_tokens(row, layer.page_size or 1, layer.num_tokens) for row in layer.rows)
        self._metrics.kept_score_ratio.observe(layer.kept_score_ratio)
        self._metrics.kept_tokens_total.inc(sharing * kept)
        self._metrics.changed_tokens_total.inc(layer.changed)


def _tokens(row: Any, page_size: int, num_tokens: int) -> int:
    """How many tokens a row of ascending page ids holds; the last page may be a part of one."""
    beyond = (int(row[-1]) + 1) * page_size - num_tokens if len(row) else 0
    return len(row) * page_size - max(0, beyond)
