"""What Ray reads from the environment when it starts, set before Ray, gRPC or torch is loaded. Imports nothing of them."""

import secrets
from collections.abc import MutableMapping

__all__ = ["prepare"]

_FOREVER = "1000000000"


def prepare(environment: MutableMapping[str, str], *, own: bool) -> None:
    """What Ray and its processes read when they start; what the operator has set stands.

    For a cluster of our own: a token in place of a file in the home folder, the loopback in place of the machine's address
    (which Ray decides by the variable that is made for Windows), no report of use, and processes that live on when Ray's
    head is gone.
    """
    wanted = {
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_COLOR_PREFIX": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    }
    if own:
        wanted |= {
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "GRPC_ENABLE_FORK_SUPPORT": "0",  # what Ray forks becomes another program at once
            "RAY_gcs_rpc_server_reconnect_timeout_s": _FOREVER,
        }
        if "RAY_AUTH_MODE" not in environment:
            wanted |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    for name, value in wanted.items():
        environment.setdefault(name, value)
