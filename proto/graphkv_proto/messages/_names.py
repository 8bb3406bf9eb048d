"""The words of the contract's enums: wire numbers to names and back, and what is said of a number nobody knows.

A name is its label without the enum's prefix, in lower case: SCORER_SNAPKV is "snapkv". Layouts keep their capitals.
"""

from collections.abc import Collection
from typing import NoReturn

from google.protobuf.descriptor import EnumDescriptor

from graphkv.terms.errors import InvalidInputError, Reason, invalid, unknown_name
from graphkv_proto import v1 as pb

__all__ = ["Names", "nested", "refuse", "shown"]


class Names:
    """One enum. `reason` is that of value 0, which stands for nothing."""

    def __init__(self, enum: EnumDescriptor, reason: Reason, *, capitals: bool = False) -> None:
        prefix = enum.values_by_number[0].name.removesuffix("UNSPECIFIED")
        self._labels = {}
        for value in enum.values:
            if value.number:
                name = value.name.removeprefix(prefix)
                self._labels[name if capitals else name.lower()] = value.name
        self._by_number = {enum.values_by_name[label].number: name for name, label in self._labels.items()}
        self._reason = reason

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the contract, in the order of their numbers."""
        return tuple(self._labels)

    def read(self, number: int, argument: str, known: Collection[str] | None = None) -> str:
        """The name. InvalidInputError where the number is 0, or its name is not among `known` (None: the contract's)."""
        name = self._by_number.get(number)
        if name is not None and (known is None or name in known):
            return name
        if number == 0:
            allowed = f"one of {', '.join(sorted(known or self._labels))}"
            raise invalid(argument, "UNSPECIFIED", allowed, reason=self._reason)
        raise unknown_name(argument, name or number, known or self._labels)

    def known(self, numbers: Collection[int]) -> tuple[str, ...]:
        """The names of those numbers that have one here."""
        return tuple(self._by_number[number] for number in numbers if number in self._by_number)

    def label(self, name: str, argument: str) -> str:
        """The enum's own label, as message constructors take it."""
        if name not in self._labels:
            raise unknown_name(argument, name, self._labels)
        return self._labels[name]


SCORER = Names(pb.Scorer.DESCRIPTOR, Reason.BAD_POLICY)
BUDGET_ALLOCATION = Names(pb.BudgetAllocation.DESCRIPTOR, Reason.BAD_POLICY)
GRANULARITY = Names(pb.Granularity.DESCRIPTOR, Reason.BAD_POLICY)
POOLING = Names(pb.Pooling.DESCRIPTOR, Reason.BAD_POLICY)
COMBINE = Names(pb.Combine.DESCRIPTOR, Reason.BAD_POLICY)
SIGNAL = Names(pb.Signal.DESCRIPTOR, Reason.BAD_POLICY)
UPDATE = Names(pb.Update.DESCRIPTOR, Reason.BAD_POLICY)
SIMILARITY = Names(pb.Similarity.DESCRIPTOR, Reason.BAD_POLICY)
IMPORTANCE = Names(pb.Importance.DESCRIPTOR, Reason.BAD_POLICY)
ENCODING = Names(pb.Encoding.DESCRIPTOR, Reason.BAD_POLICY)
OUTPUT = Names(pb.Output.DESCRIPTOR, Reason.BAD_POLICY)
ROLE = Names(pb.Role.DESCRIPTOR, Reason.BAD_SHAPE)
DTYPE = Names(pb.Dtype.DESCRIPTOR, Reason.BAD_SHAPE)
LAYOUT = Names(pb.Layout.DESCRIPTOR, Reason.BAD_SHAPE, capitals=True)
UNIT = Names(pb.Unit.DESCRIPTOR, Reason.BAD_SHAPE)
TRANSPORT = Names(pb.Transport.DESCRIPTOR, Reason.BAD_POLICY)


def nested(path: str, error: InvalidInputError) -> InvalidInputError:
    """The same error, of a value that stands at `path` in a message."""
    return InvalidInputError(f"{path}.{error.message}", argument=f"{path}.{error.argument}", reason=error.reason)


def refuse(argument: str, given: object, allowed: str) -> NoReturn:
    """Raises for what the contract has and this version does not do: ignoring it would change the answer."""
    raise invalid(argument, given, allowed, reason=Reason.UNKNOWN_NAME)


def shown(text: str) -> str:
    """A peer's text as an error may quote it: not longer than a name."""
    return text if len(text) <= 64 else text[:61] + "..."
