"""Settings: flags, environment and help are one table, and a bad value is refused with its name and what is allowed."""

import dataclasses

import pytest
from graphkv_server.config import Address, ConfigError, ServerConfig, flag, from_arguments, from_values, variable

FIELDS = [entry.name for entry in dataclasses.fields(ServerConfig)]


def settings(*arguments: str, **environment: str) -> ServerConfig:
    return from_arguments(arguments, environment, version="1.2.3")


def test_nothing_set_gives_the_documented_defaults() -> None:
    config = settings()
    assert str(config.address) == "127.0.0.1:50051"
    assert str(config.metrics_address) == "127.0.0.1:9464"
    assert config == ServerConfig()


def test_a_flag_wins_over_its_variable_and_a_variable_over_the_default() -> None:
    assert settings(GRAPHKV_GRACE="7").grace == 7.0
    assert settings("--grace", "3", GRAPHKV_GRACE="7").grace == 3.0


def test_foreign_variables_are_not_ours() -> None:
    assert settings(PATH="/bin", GRPC_VERBOSITY="debug") == ServerConfig()


def test_a_misspelt_variable_is_refused_naming_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"GRAPHKV_GRACES .*GRAPHKV_GRACE,"):
        settings(GRAPHKV_GRACES="7")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:0", Address("127.0.0.1", 0)),
        ("[::1]:5", Address("::1", 5)),
        ("host.example:65535", Address("host.example", 65535)),
    ],
)
def test_addresses(text: str, expected: Address) -> None:
    assert settings("--address", text).address == expected
    assert str(expected) == text


@pytest.mark.parametrize("text", ["", "host", "host:", ":5", "host:port", "host:65536", "::1:5", "host:-1"])
def test_bad_addresses_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--address is .*it must be host:port"):
        settings("--address", text)


@pytest.mark.parametrize("text", ["none", ""])
def test_metrics_can_be_turned_off(text: str) -> None:
    assert settings("--metrics-address", text).metrics_address is None


@pytest.mark.parametrize(
    ("text", "size"), [("1048576", 2**20), ("3MiB", 3 * 2**20), ("2 GiB", 2 * 2**30), ("1100000B", 1100000)]
)
def test_sizes(text: str, size: int) -> None:
    assert settings("--max-bytes-in-flight", text).max_bytes_in_flight == size


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("max_bytes_in_flight", "1GB"),
        ("max_bytes_in_flight", "-1"),
        ("max_bytes_in_flight", "1KiB"),
        ("max_bytes_in_flight", "1.5GiB"),
        ("max_requests_in_flight", "0"),
        ("max_requests_in_flight", "many"),
        ("max_message_bytes", "1MiB"),
        ("device", "gpu"),
        ("device", "cuda:x"),
        ("log_level", "loud"),
        ("grace", "nan"),
        ("grace", "inf"),
        ("grace", "-1"),
        ("queue_timeout", "soon"),
        ("stall_timeout", "0"),
        ("threads", "-1"),
        ("threads", "1.5"),
    ],
)
def test_bad_values_name_where_they_came_from_and_what_is_allowed(name: str, text: str) -> None:
    allowed = next(entry.metadata["allowed"] for entry in dataclasses.fields(ServerConfig) if entry.name == name)
    with pytest.raises(ConfigError) as caught:
        settings(flag(name), text)
    assert str(caught.value) == f"{flag(name)} is {text!r}; it must be {allowed}"
    with pytest.raises(ConfigError) as caught:
        settings(**{variable(name): text})
    assert str(caught.value).startswith(f"{variable(name)} is {text!r}")


def test_construction_checks_too() -> None:
    with pytest.raises(ConfigError, match="grace is -1"):
        ServerConfig(grace=-1)
    with pytest.raises(ConfigError, match="grace is nan"):
        ServerConfig(grace=float("nan"))


def test_help_says_everything_about_every_setting(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        settings("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for entry in dataclasses.fields(ServerConfig):
        assert flag(entry.name) in text
        assert variable(entry.name) in text
        assert " ".join(entry.metadata["help"].split()) in text
        assert entry.metadata["allowed"] in text


@pytest.mark.parametrize("name", FIELDS)
def test_every_default_can_be_written_as_a_flag(name: str) -> None:
    assert settings(flag(name), str(getattr(ServerConfig(), name))) == ServerConfig()


def test_variables_of_kubernetes_are_not_ours() -> None:
    links = {"GRAPHKV_SERVICE_HOST": "10.0.0.1", "GRAPHKV_PORT": "tcp://10.0.0.1:50051", "GRAPHKV_PORT_50051_TCP_ADDR": "10.0.0.1",
             "GRAPHKV_METRICS_SERVICE_PORT_HTTP": "9464"}  # fmt: skip
    assert from_arguments([], links, version="1.2.3") == from_arguments([], {}, version="1.2.3")


def test_unknown_and_shortened_flags_are_refused() -> None:
    for argument in ("--colour", "--addr=127.0.0.1:1"):
        with pytest.raises(SystemExit) as stop:
            settings(argument)
        assert stop.value.code == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        settings("--version")
    assert "1.2.3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["--ray"], True), (["--ray", "--replicas", "2"], True), (["--ray", "false"], False), ([], False)],
    ids=["alone", "before another", "false", "left out"],
)
def test_a_flag_that_stands_alone_is_true(arguments: list[str], expected: bool) -> None:
    assert settings(*arguments).ray is expected
    assert settings(*arguments, GRAPHKV_RAY="yes").ray is (expected or not arguments)


@pytest.mark.parametrize(
    ("name", "text"), [("ray", "maybe"), ("replicas", "0"), ("replica_gpus", "1.5"), ("replica_gpus", "-1")]
)
def test_bad_settings_of_many_replicas_are_refused(name: str, text: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag(name)} is {text!r}"):
        settings(flag(name), text)


def test_the_most_replicas_are_no_fewer_than_the_fewest() -> None:
    assert settings("--replicas", "2", "--max-replicas", "2").max_replicas == 2
    with pytest.raises(ConfigError, match="max_replicas is 1; it must be 0 or at least replicas, 2"):
        settings("--replicas", "2", "--max-replicas", "1")


def test_settings_as_a_config_file_has_them() -> None:
    assert from_values({"grace": 7, "address": "[::1]:0", "max_bytes_in_flight": "2MiB"}) == ServerConfig(
        grace=7.0, address=Address("::1", 0), max_bytes_in_flight=2**21
    )
    with pytest.raises(ConfigError, match=r"graces is set, .*known are .*grace,"):
        from_values({"graces": 7})
    with pytest.raises(ConfigError, match="grace is '-1'; it must be seconds, at least 0"):
        from_values({"grace": -1})
