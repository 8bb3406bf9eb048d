from graphkv_proto.v1 import policy_pb2 as _policy_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Encoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENCODING_UNSPECIFIED: _ClassVar[Encoding]
    ENCODING_EXACT: _ClassVar[Encoding]
    ENCODING_INT8: _ClassVar[Encoding]

class Importance(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    IMPORTANCE_UNSPECIFIED: _ClassVar[Importance]
    IMPORTANCE_SCORER: _ClassVar[Importance]
    IMPORTANCE_CALLER: _ClassVar[Importance]

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_KEYS: _ClassVar[Role]
    ROLE_SIMILARITY_KEYS: _ClassVar[Role]
    ROLE_POSITIONS: _ClassVar[Role]
    ROLE_QUERIES: _ClassVar[Role]
    ROLE_ATTENTION: _ClassVar[Role]
    ROLE_SCORES: _ClassVar[Role]
    ROLE_VALUE_NORMS: _ClassVar[Role]
    ROLE_QUERY_MEAN: _ClassVar[Role]
    ROLE_QUERY_COVARIANCE: _ClassVar[Role]
    ROLE_CANDIDATE_IDS: _ClassVar[Role]
    ROLE_SCALES: _ClassVar[Role]
    ROLE_ROW_FACTS: _ClassVar[Role]

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    DTYPE_F64: _ClassVar[Dtype]
    DTYPE_F32: _ClassVar[Dtype]
    DTYPE_F16: _ClassVar[Dtype]
    DTYPE_BF16: _ClassVar[Dtype]
    DTYPE_F8_E4M3FN: _ClassVar[Dtype]
    DTYPE_F8_E5M2: _ClassVar[Dtype]
    DTYPE_I8: _ClassVar[Dtype]
    DTYPE_I32: _ClassVar[Dtype]
    DTYPE_I64: _ClassVar[Dtype]

class Layout(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    LAYOUT_UNSPECIFIED: _ClassVar[Layout]
    LAYOUT_HND: _ClassVar[Layout]
    LAYOUT_NHD: _ClassVar[Layout]

class Unit(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UNIT_UNSPECIFIED: _ClassVar[Unit]
    UNIT_TOKEN: _ClassVar[Unit]
    UNIT_PAGE: _ClassVar[Unit]

class Output(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTPUT_UNSPECIFIED: _ClassVar[Output]
    OUTPUT_UPDATED_SCORES: _ClassVar[Output]
    OUTPUT_KEEP_MASK: _ClassVar[Output]
    OUTPUT_DECAY_FACTORS: _ClassVar[Output]
    OUTPUT_CHOICE_ORDER: _ClassVar[Output]
    OUTPUT_DROPPED_RANGES: _ClassVar[Output]
    OUTPUT_MOVES: _ClassVar[Output]

class Transport(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRANSPORT_UNSPECIFIED: _ClassVar[Transport]
    TRANSPORT_TCP: _ClassVar[Transport]
    TRANSPORT_REGION: _ClassVar[Transport]
    TRANSPORT_DEVICE: _ClassVar[Transport]
ENCODING_UNSPECIFIED: Encoding
ENCODING_EXACT: Encoding
ENCODING_INT8: Encoding
IMPORTANCE_UNSPECIFIED: Importance
IMPORTANCE_SCORER: Importance
IMPORTANCE_CALLER: Importance
ROLE_UNSPECIFIED: Role
ROLE_KEYS: Role
ROLE_SIMILARITY_KEYS: Role
ROLE_POSITIONS: Role
ROLE_QUERIES: Role
ROLE_ATTENTION: Role
ROLE_SCORES: Role
ROLE_VALUE_NORMS: Role
ROLE_QUERY_MEAN: Role
ROLE_QUERY_COVARIANCE: Role
ROLE_CANDIDATE_IDS: Role
ROLE_SCALES: Role
ROLE_ROW_FACTS: Role
DTYPE_UNSPECIFIED: Dtype
DTYPE_F64: Dtype
DTYPE_F32: Dtype
DTYPE_F16: Dtype
DTYPE_BF16: Dtype
DTYPE_F8_E4M3FN: Dtype
DTYPE_F8_E5M2: Dtype
DTYPE_I8: Dtype
DTYPE_I32: Dtype
DTYPE_I64: Dtype
LAYOUT_UNSPECIFIED: Layout
LAYOUT_HND: Layout
LAYOUT_NHD: Layout
UNIT_UNSPECIFIED: Unit
UNIT_TOKEN: Unit
UNIT_PAGE: Unit
OUTPUT_UNSPECIFIED: Output
OUTPUT_UPDATED_SCORES: Output
OUTPUT_KEEP_MASK: Output
OUTPUT_DECAY_FACTORS: Output
OUTPUT_CHOICE_ORDER: Output
OUTPUT_DROPPED_RANGES: Output
OUTPUT_MOVES: Output
TRANSPORT_UNSPECIFIED: Transport
TRANSPORT_TCP: Transport
TRANSPORT_REGION: Transport
TRANSPORT_DEVICE: Transport

class SelectRequest(_message.Message):
    __slots__ = ("header", "descriptors", "chunks", "end")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTORS_FIELD_NUMBER: _ClassVar[int]
    CHUNKS_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    header: Header
    descriptors: _containers.RepeatedCompositeFieldContainer[Descriptor]
    chunks: _containers.RepeatedCompositeFieldContainer[Chunk]
    end: End
    def __init__(self, header: _Optional[_Union[Header, _Mapping]] = ..., descriptors: _Optional[_Iterable[_Union[Descriptor, _Mapping]]] = ..., chunks: _Optional[_Iterable[_Union[Chunk, _Mapping]]] = ..., end: _Optional[_Union[End, _Mapping]] = ...) -> None: ...

class Header(_message.Message):
    __slots__ = ("minor", "required_features", "request_id", "policy", "fingerprint", "encoding", "layers", "query_heads", "kv_heads", "head_dim", "importance", "largest_layer_bytes", "total_bytes", "prompts", "rope", "outputs", "priority", "shard", "region_id")
    MINOR_FIELD_NUMBER: _ClassVar[int]
    REQUIRED_FEATURES_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    QUERY_HEADS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    IMPORTANCE_FIELD_NUMBER: _ClassVar[int]
    LARGEST_LAYER_BYTES_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    ROPE_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    REGION_ID_FIELD_NUMBER: _ClassVar[int]
    minor: int
    required_features: _containers.RepeatedScalarFieldContainer[str]
    request_id: str
    policy: _policy_pb2.Policy
    fingerprint: str
    encoding: Encoding
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    importance: Importance
    largest_layer_bytes: int
    total_bytes: int
    prompts: _containers.RepeatedCompositeFieldContainer[Prompt]
    rope: _policy_pb2.Rope
    outputs: _containers.RepeatedScalarFieldContainer[Output]
    priority: int
    shard: Shard
    region_id: bytes
    def __init__(self, minor: _Optional[int] = ..., required_features: _Optional[_Iterable[str]] = ..., request_id: _Optional[str] = ..., policy: _Optional[_Union[_policy_pb2.Policy, _Mapping]] = ..., fingerprint: _Optional[str] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., layers: _Optional[int] = ..., query_heads: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., importance: _Optional[_Union[Importance, str]] = ..., largest_layer_bytes: _Optional[int] = ..., total_bytes: _Optional[int] = ..., prompts: _Optional[_Iterable[_Union[Prompt, _Mapping]]] = ..., rope: _Optional[_Union[_policy_pb2.Rope, _Mapping]] = ..., outputs: _Optional[_Iterable[_Union[Output, str]]] = ..., priority: _Optional[int] = ..., shard: _Optional[_Union[Shard, _Mapping]] = ..., region_id: _Optional[bytes] = ...) -> None: ...

class Prompt(_message.Message):
    __slots__ = ("tokens", "pinned")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    pinned: _containers.RepeatedCompositeFieldContainer[TokenRange]
    def __init__(self, tokens: _Optional[int] = ..., pinned: _Optional[_Iterable[_Union[TokenRange, _Mapping]]] = ...) -> None: ...

class TokenRange(_message.Message):
    __slots__ = ("start", "stop")
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    start: int
    stop: int
    def __init__(self, start: _Optional[int] = ..., stop: _Optional[int] = ...) -> None: ...

class Shard(_message.Message):
    __slots__ = ("group", "generation", "rank", "world", "first_head", "total_heads")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    FIRST_HEAD_FIELD_NUMBER: _ClassVar[int]
    TOTAL_HEADS_FIELD_NUMBER: _ClassVar[int]
    group: str
    generation: int
    rank: int
    world: int
    first_head: int
    total_heads: int
    def __init__(self, group: _Optional[str] = ..., generation: _Optional[int] = ..., rank: _Optional[int] = ..., world: _Optional[int] = ..., first_head: _Optional[int] = ..., total_heads: _Optional[int] = ...) -> None: ...

class Descriptor(_message.Message):
    __slots__ = ("id", "prompt", "layer", "role", "dtype", "dims", "layout", "start", "count", "byte_length", "region", "device")
    ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DIMS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    BYTE_LENGTH_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    id: int
    prompt: int
    layer: int
    role: Role
    dtype: Dtype
    dims: _containers.RepeatedScalarFieldContainer[int]
    layout: Layout
    start: int
    count: int
    byte_length: int
    region: RegionPlace
    device: DevicePlace
    def __init__(self, id: _Optional[int] = ..., prompt: _Optional[int] = ..., layer: _Optional[int] = ..., role: _Optional[_Union[Role, str]] = ..., dtype: _Optional[_Union[Dtype, str]] = ..., dims: _Optional[_Iterable[int]] = ..., layout: _Optional[_Union[Layout, str]] = ..., start: _Optional[int] = ..., count: _Optional[int] = ..., byte_length: _Optional[int] = ..., region: _Optional[_Union[RegionPlace, _Mapping]] = ..., device: _Optional[_Union[DevicePlace, _Mapping]] = ...) -> None: ...

class RegionPlace(_message.Message):
    __slots__ = ("offset",)
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    offset: int
    def __init__(self, offset: _Optional[int] = ...) -> None: ...

class DevicePlace(_message.Message):
    __slots__ = ("handle", "device_uuid", "offset")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_UUID_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    handle: bytes
    device_uuid: bytes
    offset: int
    def __init__(self, handle: _Optional[bytes] = ..., device_uuid: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("descriptor", "offset", "data")
    DESCRIPTOR_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    descriptor: int
    offset: int
    data: bytes
    def __init__(self, descriptor: _Optional[int] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class End(_message.Message):
    __slots__ = ("descriptors", "bytes", "crc32c")
    DESCRIPTORS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    descriptors: int
    bytes: int
    crc32c: int
    def __init__(self, descriptors: _Optional[int] = ..., bytes: _Optional[int] = ..., crc32c: _Optional[int] = ...) -> None: ...

class SelectResponse(_message.Message):
    __slots__ = ("layers", "summary")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    layers: _containers.RepeatedCompositeFieldContainer[LayerAnswer]
    summary: Summary
    def __init__(self, layers: _Optional[_Iterable[_Union[LayerAnswer, _Mapping]]] = ..., summary: _Optional[_Union[Summary, _Mapping]] = ...) -> None: ...

class LayerAnswer(_message.Message):
    __slots__ = ("prompt", "layer", "rows", "values", "offsets", "unit", "num_tokens", "fingerprint", "exact", "importance", "scorer", "kept_score_ratio", "changed", "outputs")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    OFFSETS_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    IMPORTANCE_FIELD_NUMBER: _ClassVar[int]
    SCORER_FIELD_NUMBER: _ClassVar[int]
    KEPT_SCORE_RATIO_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    prompt: int
    layer: int
    rows: int
    values: bytes
    offsets: bytes
    unit: Unit
    num_tokens: int
    fingerprint: str
    exact: bool
    importance: Importance
    scorer: _policy_pb2.Scorer
    kept_score_ratio: float
    changed: int
    outputs: _containers.RepeatedCompositeFieldContainer[OutputTensor]
    def __init__(self, prompt: _Optional[int] = ..., layer: _Optional[int] = ..., rows: _Optional[int] = ..., values: _Optional[bytes] = ..., offsets: _Optional[bytes] = ..., unit: _Optional[_Union[Unit, str]] = ..., num_tokens: _Optional[int] = ..., fingerprint: _Optional[str] = ..., exact: bool = ..., importance: _Optional[_Union[Importance, str]] = ..., scorer: _Optional[_Union[_policy_pb2.Scorer, str]] = ..., kept_score_ratio: _Optional[float] = ..., changed: _Optional[int] = ..., outputs: _Optional[_Iterable[_Union[OutputTensor, _Mapping]]] = ...) -> None: ...

class OutputTensor(_message.Message):
    __slots__ = ("output", "dtype", "dims", "data")
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DIMS_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    output: Output
    dtype: Dtype
    dims: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, output: _Optional[_Union[Output, str]] = ..., dtype: _Optional[_Union[Dtype, str]] = ..., dims: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Summary(_message.Message):
    __slots__ = ("request_id", "seconds", "received_bytes", "encoding", "transport", "replica")
    class SecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    seconds: _containers.ScalarMap[str, float]
    received_bytes: int
    encoding: Encoding
    transport: Transport
    replica: str
    def __init__(self, request_id: _Optional[str] = ..., seconds: _Optional[_Mapping[str, float]] = ..., received_bytes: _Optional[int] = ..., encoding: _Optional[_Union[Encoding, str]] = ..., transport: _Optional[_Union[Transport, str]] = ..., replica: _Optional[str] = ...) -> None: ...
