"""ServerConfig: everything an operator can set. A field is the flag, the GRAPHKV_ variable and the help text at once.

The only reader of the environment. A flag wins over its variable, a variable over the default; a bad value is refused
at start, naming where it came from and what is allowed. Knows no gRPC and no torch.
"""

import argparse
import dataclasses
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Address", "ConfigError", "ServerConfig", "from_arguments", "from_values"]

_SIZE = re.compile(r"(\d+)\s*(|B|KiB|MiB|GiB|TiB)")
_UNITS = {"": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_MESSAGE_OVERHEAD = 64 * 2**10
"""What a message holds beside its 1 MiB of tensor bytes: header, descriptors, field lengths."""


class ConfigError(ValueError):
    """A setting that cannot be: the message names the flag or variable, what was given and what is allowed."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a listener is: a host or IP (IPv6 without its brackets) and a port; port 0 asks for any free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> "Address":
        """`host:port` or `[ipv6]:port`; ValueError otherwise."""
        host, colon, port = text.strip().rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            raise ValueError(text)
        if not colon or not host or not port.isdecimal() or int(port) > 65535:
            raise ValueError(text)
        return cls(host, int(port))


def _address(text: str) -> Address:
    return Address.parse(text)


def _optional_address(text: str) -> Address | None:
    return None if text.strip() in ("", "none") else Address.parse(text)


def _size(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(text)
    return int(match[1]) * _UNITS[match[2]]


def _seconds(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _device(text: str) -> str:
    if text not in ("auto", "cpu", "cuda") and not re.fullmatch(r"cuda:[0-9]{1,20}", text):
        raise ValueError(text)
    return text


def _share(text: str) -> float:
    value = _seconds(text)
    if value > 1 and value != int(value):
        raise ValueError(text)
    return value


def _truth(text: str) -> bool:
    truths = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in truths:
        raise ValueError(text)
    return truths[text.lower()]


def _level(text: str) -> str:
    if text not in ("debug", "info", "warning", "error"):
        raise ValueError(text)
    return text


def _about(
    parse: Callable[[str], Any],
    allowed: str,
    text: str,
    *,
    group: str,
    least: float | None = None,
    shown: str | None = None,
    alone: str | None = None,
) -> dict[str, Any]:
    """What is known of a field: how text becomes a value, what is allowed (in words), its help, what its flag alone says."""
    return {"parse": parse, "allowed": allowed, "help": text, "group": group, "least": least, "shown": shown, "alone": alone}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """One replica's settings, valid once constructed; sizes in bytes, times in seconds. ConfigError names a bad one."""

    address: Address = field(default=Address("127.0.0.1", 50051), metadata=_about(
        _address, "host:port or [ipv6]:port; port 0 takes any free one",
        "Where callers reach the service (gRPC).", group="Listeners",
    ))  # fmt: skip
    metrics_address: Address | None = field(default=Address("127.0.0.1", 9464), metadata=_about(
        _optional_address, "host:port or [ipv6]:port, port 0 for any free one, or none",
        "Where Prometheus reads /metrics; none turns it off.", group="Listeners",
    ))  # fmt: skip
    device: str = field(default="auto", metadata=_about(
        _device, "auto, cpu, cuda or cuda:N",
        "Where tokens are chosen; auto takes the first GPU, else the CPU.", group="Work",
    ))  # fmt: skip
    threads: int = field(default=0, metadata=_about(
        int, "a whole number, 0 for as many as this process has CPUs",
        "Threads of one computation on the CPU.", group="Work", least=0,
    ))  # fmt: skip
    max_batch_bytes: int = field(default=256 * 2**20, metadata=_about(
        _size, "at least 1 MiB; a number of bytes, or with KiB, MiB, GiB",
        "Tensor bytes of layers that are computed together; the next batch forms meanwhile.", group="Work",
        least=2**20, shown="256MiB",
    ))  # fmt: skip
    max_bytes_in_flight: int = field(default=2**30, metadata=_about(
        _size, "at least 1 MiB; a number of bytes, or with KiB, MiB, GiB",
        "Tensor bytes held at once for all callers together. A call whose largest layer is bigger is refused at its "
        "header; a call that is bigger as a whole flows through, unless its policy needs all layers at once.",
        group="Limits", least=2**20, shown="1GiB",
    ))  # fmt: skip
    max_requests_in_flight: int = field(default=64, metadata=_about(
        int, "a whole number, at least 1",
        "Select calls open at once; the next is refused with RESOURCE_EXHAUSTED and the time to come back.",
        group="Limits", least=1,
    ))  # fmt: skip
    queue_timeout: float = field(default=20.0, metadata=_about(
        _seconds, "seconds, at least 0",
        "How long a layer may wait for room among the bytes in flight before its call is refused.",
        group="Limits", least=0,
    ))  # fmt: skip
    stall_timeout: float = field(default=60.0, metadata=_about(
        _seconds, "seconds, at least 1",
        "How long a caller may send nothing in the middle of a call before it is ended (SLOW_CLIENT); half the queue "
        "timeout, where that is less and others wait for the room it holds.",
        group="Limits", least=1,
    ))  # fmt: skip
    max_message_bytes: int = field(default=4 * 2**20, metadata=_about(
        _size, "at least 1114112 (1 MiB of tensor bytes and 64 KiB beside them)",
        "The largest single message read. Tensors come in chunks of 1 MiB, whatever their size.",
        group="Limits", least=2**20 + _MESSAGE_OVERHEAD, shown="4MiB",
    ))  # fmt: skip
    grace: float = field(default=25.0, metadata=_about(
        _seconds, "seconds, at least 0",
        "How long running calls may finish after SIGTERM or SIGINT; new ones are refused at once. A second signal "
        "ends them.", group="Life", least=0,
    ))  # fmt: skip
    log_level: str = field(default="info", metadata=_about(
        _level, "debug, info, warning or error",
        "What is logged, as one JSON object a line on standard error.", group="Life",
    ))  # fmt: skip

    ray: bool = field(default=False, metadata=_about(
        _truth, "true or false; the flag alone is true",
        "Many replicas under Ray Serve instead of one in this process. Address and metrics address are then those of the "
        "front: Locate names the replicas, which listen on free ports of their own; /sd names their metrics for "
        "Prometheus' http_sd.", group="Many replicas", shown="false", alone="true",
    ))  # fmt: skip
    replicas: int = field(default=1, metadata=_about(
        int, "a whole number, at least 1",
        "Replicas; with a larger max-replicas the fewest there are.", group="Many replicas", least=1,
    ))  # fmt: skip
    max_replicas: int = field(default=0, metadata=_about(
        int, "a whole number, 0 for as many as replicas",
        "The most replicas; they come and go with the bytes and rows in flight.", group="Many replicas", least=0,
    ))  # fmt: skip
    replica_gpus: float = field(default=0.0, metadata=_about(
        _share, "0, a share of one GPU below 1, or a whole number",
        "GPUs that Ray reserves for each replica; 0.5 lets two share one.", group="Many replicas", least=0,
    ))  # fmt: skip
    replica_cpus: float = field(default=1.0, metadata=_about(
        _seconds, "a number, at least 0",
        "CPUs that Ray reserves for each replica.", group="Many replicas", least=0,
    ))  # fmt: skip
    ray_address: str = field(default="", metadata=_about(
        str, "the address of a Ray cluster (host:port or auto), or nothing to start one on this machine alone",
        "Which cluster the replicas run in.", group="Many replicas",
    ))  # fmt: skip

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            least, value = entry.metadata["least"], getattr(self, entry.name)
            if least is not None and not value >= least:
                raise ConfigError(f"{entry.name} is {value!r}; it must be {entry.metadata['allowed']}")
        if 0 < self.max_replicas < self.replicas:
            raise ConfigError(f"max_replicas is {self.max_replicas}; it must be 0 or at least replicas, {self.replicas}")


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def variable(name: str) -> str:
    """The environment variable of a field."""
    return "GRAPHKV_" + name.upper()


def from_values(values: Mapping[str, object]) -> ServerConfig:
    """The configuration of fields by name, each a value as text or number (as a config file has them).

    Raises ConfigError for an unknown name or a bad value.
    """
    known = {entry.name: entry for entry in dataclasses.fields(ServerConfig)}
    for name in values:
        if name not in known:
            raise ConfigError(f"{name} is set, but there is no such setting; known are {', '.join(sorted(known))}")
    return ServerConfig(**{name: _parsed(known[name], str(value), name) for name, value in values.items()})


_SERVICE_LINK = re.compile(r"GRAPHKV(_.*)?_(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT(_.*)?)")
"""What Kubernetes tells every pod beside a Service named graphkv or graphkv-something."""


def from_arguments(arguments: Sequence[str], environment: Mapping[str, str], *, version: str) -> ServerConfig:
    """The configuration of a command line and an environment (`sys.argv[1:]`, `os.environ`).

    Raises ConfigError for a bad value or an unknown GRAPHKV_ variable; `--help`, `--version` and an unknown flag end
    the process as argparse does.
    """
    given = vars(_parser(version).parse_args(list(arguments)))
    known = {variable(entry.name): entry for entry in dataclasses.fields(ServerConfig)}
    for name in environment:
        # What starts like ours is meant for us, and a slip of the pen should not pass; but for what Kubernetes puts there.
        if name.startswith("GRAPHKV_") and name not in known and not _SERVICE_LINK.fullmatch(name):
            raise ConfigError(f"{name} is set, but there is no such setting; known are {', '.join(sorted(known))}")
    values: dict[str, Any] = {}
    for name, entry in known.items():
        text, source = given[entry.name], flag(entry.name)
        if text is None and name in environment:
            text, source = environment[name], name
        if text is not None:
            values[entry.name] = _parsed(entry, text, source)
    return ServerConfig(**values)


def _parsed(entry: "dataclasses.Field[Any]", text: str, source: str) -> Any:
    try:
        value = entry.metadata["parse"](text)
        fits = entry.metadata["least"] is None or value >= entry.metadata["least"]
    except (ValueError, OverflowError):
        fits = False
    if not fits:
        raise ConfigError(f"{source} is {text!r}; it must be {entry.metadata['allowed']}")
    return value


def _parser(version: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="graphkv-serve",
        description="Serves graphkv.v1.Compression: callers send the keys of a prompt, layer by layer, and get back "
        "which tokens of each KV head to keep.",
        epilog=_EPILOG,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"graphkv-serve {version}")
    groups: dict[str, Any] = {}
    for entry in dataclasses.fields(ServerConfig):
        about = entry.metadata
        group = groups.get(about["group"]) or groups.setdefault(about["group"], parser.add_argument_group(about["group"]))
        default = about["shown"] or entry.default
        text = f"{about['help']}\nAllowed: {about['allowed']}.\nDefault {default}; environment {variable(entry.name)}."
        alone = {} if about["alone"] is None else {"nargs": "?", "const": about["alone"]}
        group.add_argument(flag(entry.name), metavar="VALUE", help=text.replace("%", "%%"), **alone)
    return parser


_EPILOG = """\
Every setting can also stand in the environment, by the name in its help; a flag wins over its variable.
When the service is ready it prints one line on standard output: its addresses, device and limits.

SIGTERM and SIGINT drain: health turns NOT_SERVING, new calls get UNAVAILABLE, running ones finish within the grace;
then the process ends with 0. A setting that cannot be, or a port that is taken, ends it with 2.

Examples:
  graphkv-serve
  graphkv-serve --address 0.0.0.0:50051 --device cuda:0 --max-bytes-in-flight 8GiB
  graphkv-serve --ray --replicas 2 --replica-gpus 0.5
  GRAPHKV_GRACE=60 graphkv-serve --address 127.0.0.1:0 --metrics-address none"""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Help texts keep the line breaks they were written with, and are wrapped between them."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [line for part in text.splitlines() for line in textwrap.wrap(part, width)]
