from graphkv_proto.v1 import policy_pb2 as _policy_pb2
from graphkv_proto.v1 import select_pb2 as _select_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetCapabilitiesRequest(_message.Message):
    __slots__ = ("minor",)
    MINOR_FIELD_NUMBER: _ClassVar[int]
    minor: int
    def __init__(self, minor: _Optional[int] = ...) -> None: ...

class GetCapabilitiesResponse(_message.Message):
    __slots__ = ("version", "minor", "features", "scorers", "budget_allocations", "granularities", "signals", "updates", "similarities", "encodings", "outputs", "max_bytes_in_flight", "max_message_bytes", "chunk_bytes", "devices", "replica", "metrics_address")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MINOR_FIELD_NUMBER: _ClassVar[int]
    FEATURES_FIELD_NUMBER: _ClassVar[int]
    SCORERS_FIELD_NUMBER: _ClassVar[int]
    BUDGET_ALLOCATIONS_FIELD_NUMBER: _ClassVar[int]
    GRANULARITIES_FIELD_NUMBER: _ClassVar[int]
    SIGNALS_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    SIMILARITIES_FIELD_NUMBER: _ClassVar[int]
    ENCODINGS_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    METRICS_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    version: str
    minor: int
    features: _containers.RepeatedScalarFieldContainer[str]
    scorers: _containers.RepeatedScalarFieldContainer[_policy_pb2.Scorer]
    budget_allocations: _containers.RepeatedScalarFieldContainer[_policy_pb2.BudgetAllocation]
    granularities: _containers.RepeatedScalarFieldContainer[_policy_pb2.Granularity]
    signals: _containers.RepeatedScalarFieldContainer[_policy_pb2.Signal]
    updates: _containers.RepeatedScalarFieldContainer[_policy_pb2.Update]
    similarities: _containers.RepeatedScalarFieldContainer[_policy_pb2.Similarity]
    encodings: _containers.RepeatedScalarFieldContainer[_select_pb2.Encoding]
    outputs: _containers.RepeatedScalarFieldContainer[_select_pb2.Output]
    max_bytes_in_flight: int
    max_message_bytes: int
    chunk_bytes: int
    devices: _containers.RepeatedScalarFieldContainer[str]
    replica: str
    metrics_address: str
    def __init__(self, version: _Optional[str] = ..., minor: _Optional[int] = ..., features: _Optional[_Iterable[str]] = ..., scorers: _Optional[_Iterable[_Union[_policy_pb2.Scorer, str]]] = ..., budget_allocations: _Optional[_Iterable[_Union[_policy_pb2.BudgetAllocation, str]]] = ..., granularities: _Optional[_Iterable[_Union[_policy_pb2.Granularity, str]]] = ..., signals: _Optional[_Iterable[_Union[_policy_pb2.Signal, str]]] = ..., updates: _Optional[_Iterable[_Union[_policy_pb2.Update, str]]] = ..., similarities: _Optional[_Iterable[_Union[_policy_pb2.Similarity, str]]] = ..., encodings: _Optional[_Iterable[_Union[_select_pb2.Encoding, str]]] = ..., outputs: _Optional[_Iterable[_Union[_select_pb2.Output, str]]] = ..., max_bytes_in_flight: _Optional[int] = ..., max_message_bytes: _Optional[int] = ..., chunk_bytes: _Optional[int] = ..., devices: _Optional[_Iterable[str]] = ..., replica: _Optional[str] = ..., metrics_address: _Optional[str] = ...) -> None: ...

class LocateRequest(_message.Message):
    __slots__ = ("group", "limit")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    group: str
    limit: int
    def __init__(self, group: _Optional[str] = ..., limit: _Optional[int] = ...) -> None: ...

class LocateResponse(_message.Message):
    __slots__ = ("replicas",)
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    replicas: _containers.RepeatedCompositeFieldContainer[Replica]
    def __init__(self, replicas: _Optional[_Iterable[_Union[Replica, _Mapping]]] = ...) -> None: ...

class Replica(_message.Message):
    __slots__ = ("replica", "address", "bytes_in_flight", "max_bytes_in_flight")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    BYTES_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    MAX_BYTES_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    replica: str
    address: str
    bytes_in_flight: int
    max_bytes_in_flight: int
    def __init__(self, replica: _Optional[str] = ..., address: _Optional[str] = ..., bytes_in_flight: _Optional[int] = ..., max_bytes_in_flight: _Optional[int] = ...) -> None: ...
