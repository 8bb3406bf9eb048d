from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Scorer(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SCORER_UNSPECIFIED: _ClassVar[Scorer]
    SCORER_SNAPKV: _ClassVar[Scorer]
    SCORER_KNORM: _ClassVar[Scorer]
    SCORER_GIVEN: _ClassVar[Scorer]
    SCORER_H2O: _ClassVar[Scorer]
    SCORER_TOVA: _ClassVar[Scorer]
    SCORER_KEYDIFF: _ClassVar[Scorer]
    SCORER_EXPECTED_ATTENTION: _ClassVar[Scorer]
    SCORER_CAKE: _ClassVar[Scorer]

class BudgetAllocation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BUDGET_ALLOCATION_UNSPECIFIED: _ClassVar[BudgetAllocation]
    BUDGET_ALLOCATION_UNIFORM: _ClassVar[BudgetAllocation]
    BUDGET_ALLOCATION_PYRAMID: _ClassVar[BudgetAllocation]
    BUDGET_ALLOCATION_CAKE: _ClassVar[BudgetAllocation]
    BUDGET_ALLOCATION_ADAPTIVE_HEADS: _ClassVar[BudgetAllocation]

class Granularity(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GRANULARITY_UNSPECIFIED: _ClassVar[Granularity]
    GRANULARITY_HEAD: _ClassVar[Granularity]
    GRANULARITY_LAYER: _ClassVar[Granularity]
    GRANULARITY_MODEL: _ClassVar[Granularity]

class Pooling(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POOLING_UNSPECIFIED: _ClassVar[Pooling]
    POOLING_AVG: _ClassVar[Pooling]
    POOLING_MAX: _ClassVar[Pooling]

class Combine(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMBINE_UNSPECIFIED: _ClassVar[Combine]
    COMBINE_MEAN: _ClassVar[Combine]
    COMBINE_MAX: _ClassVar[Combine]

class Signal(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SIGNAL_UNSPECIFIED: _ClassVar[Signal]
    SIGNAL_DECAY: _ClassVar[Signal]
    SIGNAL_ENHANCE: _ClassVar[Signal]
    SIGNAL_EVICT: _ClassVar[Signal]

class Update(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UPDATE_UNSPECIFIED: _ClassVar[Update]
    UPDATE_PRODUCT: _ClassVar[Update]
    UPDATE_ADDITIVE: _ClassVar[Update]
    UPDATE_SEQUENTIAL: _ClassVar[Update]

class Similarity(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SIMILARITY_UNSPECIFIED: _ClassVar[Similarity]
    SIMILARITY_POST_ROPE: _ClassVar[Similarity]
    SIMILARITY_PRE_ROPE: _ClassVar[Similarity]
SCORER_UNSPECIFIED: Scorer
SCORER_SNAPKV: Scorer
SCORER_KNORM: Scorer
SCORER_GIVEN: Scorer
SCORER_H2O: Scorer
SCORER_TOVA: Scorer
SCORER_KEYDIFF: Scorer
SCORER_EXPECTED_ATTENTION: Scorer
SCORER_CAKE: Scorer
BUDGET_ALLOCATION_UNSPECIFIED: BudgetAllocation
BUDGET_ALLOCATION_UNIFORM: BudgetAllocation
BUDGET_ALLOCATION_PYRAMID: BudgetAllocation
BUDGET_ALLOCATION_CAKE: BudgetAllocation
BUDGET_ALLOCATION_ADAPTIVE_HEADS: BudgetAllocation
GRANULARITY_UNSPECIFIED: Granularity
GRANULARITY_HEAD: Granularity
GRANULARITY_LAYER: Granularity
GRANULARITY_MODEL: Granularity
POOLING_UNSPECIFIED: Pooling
POOLING_AVG: Pooling
POOLING_MAX: Pooling
COMBINE_UNSPECIFIED: Combine
COMBINE_MEAN: Combine
COMBINE_MAX: Combine
SIGNAL_UNSPECIFIED: Signal
SIGNAL_DECAY: Signal
SIGNAL_ENHANCE: Signal
SIGNAL_EVICT: Signal
UPDATE_UNSPECIFIED: Update
UPDATE_PRODUCT: Update
UPDATE_ADDITIVE: Update
UPDATE_SEQUENTIAL: Update
SIMILARITY_UNSPECIFIED: Similarity
SIMILARITY_POST_ROPE: Similarity
SIMILARITY_PRE_ROPE: Similarity

class Policy(_message.Message):
    __slots__ = ("budget_tokens", "budget_ratio", "scorer", "budget_allocation", "window", "pool_width", "pooling", "sinks", "granularity", "page_size", "page_align", "combine", "options", "graph")
    class OptionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    BUDGET_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BUDGET_RATIO_FIELD_NUMBER: _ClassVar[int]
    SCORER_FIELD_NUMBER: _ClassVar[int]
    BUDGET_ALLOCATION_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    POOL_WIDTH_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    SINKS_FIELD_NUMBER: _ClassVar[int]
    GRANULARITY_FIELD_NUMBER: _ClassVar[int]
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_ALIGN_FIELD_NUMBER: _ClassVar[int]
    COMBINE_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    GRAPH_FIELD_NUMBER: _ClassVar[int]
    budget_tokens: int
    budget_ratio: float
    scorer: Scorer
    budget_allocation: BudgetAllocation
    window: int
    pool_width: int
    pooling: Pooling
    sinks: int
    granularity: Granularity
    page_size: int
    page_align: int
    combine: Combine
    options: _containers.ScalarMap[str, float]
    graph: Graph
    def __init__(self, budget_tokens: _Optional[int] = ..., budget_ratio: _Optional[float] = ..., scorer: _Optional[_Union[Scorer, str]] = ..., budget_allocation: _Optional[_Union[BudgetAllocation, str]] = ..., window: _Optional[int] = ..., pool_width: _Optional[int] = ..., pooling: _Optional[_Union[Pooling, str]] = ..., sinks: _Optional[int] = ..., granularity: _Optional[_Union[Granularity, str]] = ..., page_size: _Optional[int] = ..., page_align: _Optional[int] = ..., combine: _Optional[_Union[Combine, str]] = ..., options: _Optional[_Mapping[str, float]] = ..., graph: _Optional[_Union[Graph, _Mapping]] = ...) -> None: ...

class Graph(_message.Message):
    __slots__ = ("source_ratio", "neighbors_auto", "neighbors_count", "threshold", "candidates", "similarity", "rounds", "strength", "signal", "update")
    SOURCE_RATIO_FIELD_NUMBER: _ClassVar[int]
    NEIGHBORS_AUTO_FIELD_NUMBER: _ClassVar[int]
    NEIGHBORS_COUNT_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    SIMILARITY_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    STRENGTH_FIELD_NUMBER: _ClassVar[int]
    SIGNAL_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    source_ratio: float
    neighbors_auto: NeighborsAuto
    neighbors_count: int
    threshold: float
    candidates: float
    similarity: Similarity
    rounds: int
    strength: float
    signal: Signal
    update: Update
    def __init__(self, source_ratio: _Optional[float] = ..., neighbors_auto: _Optional[_Union[NeighborsAuto, _Mapping]] = ..., neighbors_count: _Optional[int] = ..., threshold: _Optional[float] = ..., candidates: _Optional[float] = ..., similarity: _Optional[_Union[Similarity, str]] = ..., rounds: _Optional[int] = ..., strength: _Optional[float] = ..., signal: _Optional[_Union[Signal, str]] = ..., update: _Optional[_Union[Update, str]] = ...) -> None: ...

class NeighborsAuto(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Rope(_message.Message):
    __slots__ = ("inv_freq", "rotary_dim", "interleaved")
    INV_FREQ_FIELD_NUMBER: _ClassVar[int]
    ROTARY_DIM_FIELD_NUMBER: _ClassVar[int]
    INTERLEAVED_FIELD_NUMBER: _ClassVar[int]
    inv_freq: _containers.RepeatedScalarFieldContainer[float]
    rotary_dim: int
    interleaved: bool
    def __init__(self, inv_freq: _Optional[_Iterable[float]] = ..., rotary_dim: _Optional[int] = ..., interleaved: bool = ...) -> None: ...
