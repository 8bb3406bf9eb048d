"""Metrics: the table keeps HOUSE's naming rules, callers cannot invent labels, and the listener shows what was counted."""

import re
import urllib.request

import pytest
from graphkv_server.config import Address
from graphkv_server.metrics import ABANDONED, OK, TABLE, Metric, Metrics, MetricsListener
from prometheus_client import Counter

from graphkv.terms.errors import Reason

UNITS = ("seconds", "bytes", "ratio", "rows", "requests", "replicas", "info")


@pytest.mark.parametrize("line", TABLE, ids=lambda line: line.name)
def test_names_say_thing_and_unit(line: Metric) -> None:
    assert re.fullmatch(r"graphkv_[a-z_]+", line.name)
    assert line.name.endswith("_total") == (line.kind is Counter)
    assert line.name.endswith(("_total", *(f"_{unit}" for unit in UNITS)))
    assert line.help.endswith(".")


def test_every_line_of_the_table_is_an_attribute() -> None:
    metrics = Metrics(version="1", device="cpu")
    declared = {name for name in Metrics.__annotations__ if name != "registry"}
    assert declared == {line.name.removeprefix("graphkv_") for line in TABLE}
    assert all(hasattr(metrics, name) for name in declared)


@pytest.mark.parametrize("outcome", [OK, ABANDONED, *Reason])
def test_known_outcomes_are_counted_as_they_are(outcome: str) -> None:
    metrics = Metrics()
    metrics.ended("Select", outcome, 0.5)
    labels = {"method": "Select", "reason": str(outcome), "tenant": "other"}
    assert metrics.registry.get_sample_value("graphkv_requests_total", labels) == 1


def test_no_outcome_makes_a_series_of_its_own() -> None:
    metrics = Metrics()
    for number in range(1000):
        metrics.ended("Select", f"TEXT_{number}", 0.1)
    series = [
        sample for family in metrics.registry.collect() for sample in family.samples if sample.name == "graphkv_requests_total"
    ]
    assert [(sample.labels["reason"], sample.value) for sample in series] == [("BUG", 1000)]


def test_two_replicas_count_apart() -> None:
    first, second = Metrics(), Metrics()
    first.in_flight_bytes.set(7)
    assert second.registry.get_sample_value("graphkv_in_flight_bytes") == 0


def test_the_listener_serves_them_on_a_free_port_and_gives_it_back() -> None:
    metrics = Metrics(version="1.2", device="cpu")
    listener = MetricsListener(metrics.registry, Address("127.0.0.1", 0), list)
    try:
        with pytest.raises(OSError, match="in use"):
            MetricsListener(metrics.registry, listener.address, list)
        text = urllib.request.urlopen(f"http://{listener.address}/metrics").read().decode()
    finally:
        listener.close()
    assert 'graphkv_build_info{device="cpu",version="1.2"} 1.0' in text
    assert "process_resident_memory_bytes" in text
    assert "_created" not in text
    MetricsListener(metrics.registry, listener.address, list).close()
