"""Promise: what the dashboard in docker/monitoring asks for is what /metrics exports."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from tiny_model import encoded

import service

MONITORING = Path(service.__file__).parents[1] / "docker" / "monitoring"
ONLY_ON_A_GPU = {"encnet_gpu_memory_used_bytes"}
ADDED_BY_PROMETHEUS = {"instance", "le"}


def test_grafanas_own_models_know_every_field_of_the_dashboard() -> None:
    register_default_plugins()
    written = json.loads((MONITORING / "encnet.json").read_text(encoding="utf-8"))
    read = json.loads(json.dumps(Dashboard.from_json(written), cls=JSONEncoder))
    assert_contains(read, written)
    for panel in written["panels"]:
        panel.setdefault("options", {})["colour"] = {}
        with pytest.raises(AssertionError, match="options/colour"):
            assert_contains(json.loads(json.dumps(Dashboard.from_json(written), cls=JSONEncoder)), written)
        del panel["options"]["colour"]


def assert_contains(whole: Any, part: Any, path: str = "") -> None:
    """Every key and value of the part is in the whole, at the same place."""
    if isinstance(part, dict):
        for key in part:
            assert key in whole, f"{path}/{key}"
            assert_contains(whole[key], part[key], f"{path}/{key}")
    elif isinstance(part, list):
        assert len(whole) == len(part), path
        for index, (one, other) in enumerate(zip(whole, part, strict=True)):
            assert_contains(one, other, f"{path}/{index}")
    else:
        assert whole == part, path


def test_every_query_names_metrics_and_labels_that_are_exported(client: TestClient, quadrants: np.ndarray) -> None:
    client.post("/segment", content=encoded(quadrants))
    client.post("/segment/batch", files=[("image", b"no picture")])
    families = list(text_string_to_metric_families(client.get("/metrics").text))
    labels: dict[str, set[str]] = {}
    for family in families:
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    panels = json.loads((MONITORING / "encnet.json").read_text(encoding="utf-8"))["panels"]
    for query in [target["expr"] for panel in panels for target in panel["targets"]]:
        names = set(re.findall(r"\b(?:encnet|process)_\w+", query)) - ONLY_ON_A_GPU
        assert names <= labels.keys(), query
        grouped = re.findall(r"(?:by|on) \(([^)]*)\)", query)
        used = {label.strip() for group in grouped for label in group.split(",")}
        used |= set(re.findall(r'(\w+)=~?"', query))
        assert used - ADDED_BY_PROMETHEUS <= set().union(*(labels[name] for name in names)), query


def test_presence_is_counted_by_class_and_by_the_services_own_threshold(
    client: TestClient, quadrants: np.ndarray
) -> None:
    picture = encoded(quadrants[:15, 20:])  # red alone
    before = client.get("/metrics").text
    assert 'encnet_pictures_total{model="tiny"} 0.0' in before
    assert 'encnet_present_total{class="red",model="tiny"} 0.0' in before
    answers = [client.post("/segment", content=picture, params=options).json() for options in ({}, {"threshold": "1"})]
    text = client.get("/metrics").text
    assert 'encnet_pictures_total{model="tiny"} 2.0' in text
    for row in answers[0]["presence"]:
        assert f'encnet_present_total{{class="{row["class"]}",model="tiny"}} {2.0 if row["present"] else 0.0}' in text
    assert {row["present"] for row in answers[0]["presence"]} == {True, False}
