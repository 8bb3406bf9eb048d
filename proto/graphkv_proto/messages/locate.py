"""Locate: which replicas a caller may go to."""

from dataclasses import dataclass

from graphkv_proto import v1 as pb

__all__ = ["Located", "read_locate_response", "write_locate_request"]


@dataclass(frozen=True, slots=True)
class Located:
    """One replica: its name, host:port, and the tensor bytes it holds and may hold."""

    replica: str
    address: str
    bytes_in_flight: int
    max_bytes_in_flight: int

    @property
    def load(self) -> float:
        """The share of its room that is taken, 0 to 1; 0 where it did not say."""
        return min(1.0, self.bytes_in_flight / self.max_bytes_in_flight) if self.max_bytes_in_flight > 0 else 0.0


def write_locate_request(*, group: str = "", limit: int = 0) -> pb.LocateRequest:
    """`limit`: how many replicas to name at most; 0 = all."""
    return pb.LocateRequest(group=group, limit=limit)


def read_locate_response(response: pb.LocateResponse) -> list[Located]:
    """The replicas named, but for those without an address."""
    return [
        Located(each.replica, each.address, max(0, each.bytes_in_flight), each.max_bytes_in_flight)
        for each in response.replicas
        if each.address
    ]
