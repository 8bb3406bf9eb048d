"""What a call has to bring for its policy: the one rule about sources of importance and graph inputs, for all floors.

Takes names, counts and terms; knows no array library.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from graphkv.terms.catalogue import OUTPUTS, SCORERS
from graphkv.terms.errors import GraphKVError, InvalidInputError, Reason, invalid, unknown_name
from graphkv.terms.policy import Policy
from graphkv.terms.rope import Rope

__all__ = ["as_given", "check_graph_inputs", "check_outputs", "check_source", "naming_values", "query_rows", "reads_attention"]


def check_source(policy: Policy, sources: Sequence[str], *, rows: int, num_tokens: int, extras: Sequence[str] = ()) -> None:
    """At most one source of importance, the one the scorer can use, with as many query rows as it takes, and its extras.

    `sources`: which of queries, attention, scores were given; `rows`: the query rows of the first two, else 0; `extras`:
    which of value_norms, query_mean, query_covariance. Raises InvalidInputError naming the argument.
    """
    needs = () if "scores" in sources else SCORERS[policy.scorer].needs
    for role in extras:
        if role not in needs:
            allowed = f"left out: the scorer {policy.scorer!r} does not read it"
            raise invalid(_argument(role), "given", allowed, reason=Reason.BAD_SHAPE)
    for role in needs:
        if role not in extras:
            allowed = f"given (or scores=): the scorer {policy.scorer!r} needs it"
            raise invalid(_argument(role), None, allowed, reason=Reason.BAD_SHAPE)
    if len(sources) > 1:
        raise invalid(sources[1], "given", f"left out where {sources[0]}= is given", reason=Reason.BAD_SHAPE)
    source = sources[0] if sources else None
    if source == "scores":
        if policy.budget_allocation == "cake":
            allowed = 'left out: the budget allocation "cake" needs queries= or attention='
            raise invalid("scores", "given", allowed, reason=Reason.BAD_SHAPE)
        return
    if not reads_attention(policy):
        if policy.scorer == "given":
            raise invalid("scores", None, 'given: the scorer is "given"', reason=Reason.BAD_SHAPE)
        if source is not None:
            raise invalid(source, "given", f"left out: the scorer {policy.scorer!r} does not read it", reason=Reason.BAD_SHAPE)
        return
    if source is None:
        allowed = f"given (or attention=, or scores=): the scorer {policy.scorer!r} needs it"
        if policy.budget_allocation == "cake":
            allowed = 'given (or attention=): the budget allocation "cake" needs it'
        raise invalid("queries", None, allowed, reason=Reason.BAD_SHAPE)
    wanted = query_rows(policy, num_tokens)
    if wanted is not None and rows != wanted:
        which = "one a token" if SCORERS[policy.scorer].query_rows == "all" else "the policy's observation window"
        raise invalid(source, f"{rows} rows", f"{wanted} rows, {which}", reason=Reason.BAD_SHAPE)


def reads_attention(policy: Policy) -> bool:
    """Whether the policy needs queries or attention: for its scorer, or to spread its budget."""
    return SCORERS[policy.scorer].reads_attention or policy.budget_allocation == "cake"


def query_rows(policy: Policy, num_tokens: int) -> int | None:
    """How many last queries the policy takes for a prompt of this length; None = any number."""
    kind = SCORERS[policy.scorer].query_rows
    if kind == "any" and policy.budget_allocation != "cake":
        return None
    return num_tokens if kind == "all" else min(policy.observation_window(), num_tokens)


def check_outputs(policy: Policy, outputs: Sequence[str]) -> tuple[str, ...]:
    """The outputs asked for, each once; raises InvalidInputError where one is none, or this policy cannot give it."""
    if isinstance(outputs, str) or not isinstance(outputs, Sequence):
        raise invalid("outputs", outputs, "a sequence of names", reason=Reason.BAD_SHAPE)
    for name in outputs:
        if not isinstance(name, str) or name not in OUTPUTS:
            raise unknown_name("outputs", name, OUTPUTS)
    if "decay_factors" in outputs and policy.granularity != "head":
        allowed = f'left out where granularity is "{policy.granularity}": each head has its own'
        raise invalid("outputs", "decay_factors", allowed, reason=Reason.BAD_SHAPE)
    if "choice_order" in outputs:
        sequential = policy.graph is not None and policy.graph.update == "sequential"
        if policy.is_coarse or not sequential or policy.budget_allocation == "adaptive_heads":
            allowed = 'left out unless graph.update is "sequential" and each head keeps B tokens of its own'
            raise invalid("outputs", "choice_order", allowed, reason=Reason.BAD_SHAPE)
    return tuple(name for name in OUTPUTS if name in outputs)


def check_graph_inputs(policy: Policy, *, similarity_keys: bool, rope: Rope | None, head_dim: int) -> None:
    """pre_rope needs a rope or similarity keys; post_rope takes no similarity keys.

    Raises InvalidInputError naming the argument; reason ROPE_MISSING where the rope is.
    """
    graph = policy.graph
    if similarity_keys and (graph is None or graph.similarity != "pre_rope"):
        raise invalid("similarity_keys", "given", 'left out unless graph.similarity is "pre_rope"', reason=Reason.BAD_SHAPE)
    if not policy.needs_rope or similarity_keys:
        return
    if rope is None:
        message = 'graph.similarity is "pre_rope", which needs rope= (Rope.from_config(model.config)) or similarity_keys='
        raise InvalidInputError(message, argument="rope", reason=Reason.ROPE_MISSING)
    if rope.rotary_dim > head_dim:
        raise invalid("rope.rotary_dim", rope.rotary_dim, f"at most head_dim, {head_dim}", reason=Reason.BAD_SHAPE)


def as_given(error: GraphKVError) -> GraphKVError:
    """The same error, naming what callers pass: `values`, where what is checked and travels is their `value_norms`."""
    if "value_norms" in error.message:
        error.message = error.message.replace("value_norms", "values (their norms)")
        error.args = (error.message,)
    if error.argument is not None:
        error.argument = _argument(error.argument)
    return error


@contextmanager
def naming_values() -> Iterator[None]:
    """A door that values= comes in by: errors leave it `as_given`."""
    try:
        yield
    except GraphKVError as error:
        as_given(error)
        raise


def _argument(role: str) -> str:
    return "values" if role == "value_norms" else role
