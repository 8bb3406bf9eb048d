"""The questions a client asks beside its calls: who serves, are you there, does your work move. Messages only; no socket."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from graphkv_proto import messages

from graphkv.terms.errors import GraphKVError
from graphkv.terms.policy import Policy
from graphkv_client._call import Selecting, selecting
from graphkv_client._inputs import CallTerms
from graphkv_client._replicas import Seat

__all__ = ["QUESTION_TIMEOUT", "Work", "replica_of", "seats_of"]

QUESTION_TIMEOUT = 1.0
"""Seconds that an answer may take."""


def seats_of(response: Any) -> list[Seat]:
    """Locate's answer."""
    return [Seat(each.replica, each.address, each.load) for each in messages.read_locate_response(response)]


def replica_of(response: Any) -> str | None:
    """Who answered for its capabilities; None where the answer is none of ours."""
    try:
        return messages.read_capabilities(response).replica
    except GraphKVError:
        return None


class Work:
    """The smallest Select there is, whose answer shows that a replica's engine turns: one KV head, two tokens, keep one."""

    def __init__(self) -> None:
        policy = Policy(budget=1, scorer="knorm", graph=None, sinks=0, window=0)
        keys = np.ones((1, 1, 2, 1), np.float32)
        self._plan: Selecting = selecting({"keys": keys}, terms=CallTerms(policy), pinned=None, encoding="exact")

    def requests(self) -> Iterator[Any]:
        """Its messages."""
        return self._plan.requests()

    def fold(self, response: Any) -> None:
        """Takes in the answer."""
        self._plan.call.fold(response)

    def replica(self) -> str:
        """Who did the work; raises InternalError where it was not done."""
        self._plan.call.close()
        return self._plan.call.summary(seconds={}).where
