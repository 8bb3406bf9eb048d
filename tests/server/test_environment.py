"""What Ray's own variables are set to before it starts: a token and the loopback for our own cluster, nothing over an operator's."""

import pytest
from graphkv_server.ray.environment import prepare


def test_a_cluster_of_our_own_has_a_token_and_the_loopback() -> None:
    first: dict[str, str] = {}
    second: dict[str, str] = {}
    prepare(first, own=True)
    prepare(second, own=True)
    assert first["RAY_AUTH_MODE"] == "token"
    assert len(first["RAY_AUTH_TOKEN"]) == 64
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]
    assert first["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert first["RAY_USAGE_STATS_ENABLED"] == "0"


def test_another_cluster_s_rules_are_its_own() -> None:
    environment: dict[str, str] = {}
    prepare(environment, own=False)
    assert not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"} & environment.keys()


@pytest.mark.parametrize("own", [True, False])
def test_what_the_operator_has_set_stands(own: bool) -> None:
    environment = {"RAY_AUTH_MODE": "disabled", "RAY_DEDUP_LOGS": "1"}
    prepare(environment, own=own)
    assert environment["RAY_AUTH_MODE"] == "disabled"
    assert environment["RAY_DEDUP_LOGS"] == "1"
    assert "RAY_AUTH_TOKEN" not in environment
