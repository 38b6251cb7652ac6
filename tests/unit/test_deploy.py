"""The files for operators name what the service has."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import yaml

SERVING = Path(__file__).parents[2] / "serving"
DEPLOY = SERVING / "deploy"
# Read and not imported: BentoML takes a second.
CONSTANTS = {
    node.targets[0].id: node.value
    for node in ast.parse((SERVING / "service.py").read_text()).body
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
}
MANIFEST = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
DASHBOARD = json.loads((DEPLOY / "grafana.json").read_text())
METRICS = (Path(__file__).parents[2] / "ad2kit" / "service_metrics.py").read_text()


def of_kind(kind: str) -> dict[str, Any]:
    (found,) = [each for each in MANIFEST if each["kind"] == kind]
    return dict(found)


def test_selectors_and_references_meet() -> None:
    pod = of_kind("Deployment")["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert of_kind("Deployment")["spec"]["selector"]["matchLabels"] == labels
    assert of_kind("Service")["spec"]["selector"] == labels
    assert of_kind("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    target = of_kind("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert target["name"] == of_kind("Deployment")["metadata"]["name"]
    (container,) = pod["spec"]["containers"]
    ports = {port["name"] for port in container["ports"]}
    assert {of_kind("Service")["spec"]["ports"][0]["targetPort"]} == ports


def test_a_pod_is_not_killed_while_it_answers() -> None:
    pod = of_kind("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    _, delay_s = container["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] > int(delay_s) + ast.literal_eval(
        CONSTANTS["DEADLINE_S"]
    )
    for probe in ("readinessProbe", "startupProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in ast.literal_eval(CONSTANTS["PUBLIC"])


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    asked = {
        name
        for panel in DASHBOARD["panels"]
        for target in panel["targets"]
        for name in re.findall(r"ad2kit_(\w+)", target["expr"])
    }
    for name in asked:
        stem = re.sub("_(total|bucket|sum|count)$", "", name)
        kind, _, unit = stem.partition("_")
        literal = f'"{stem}"' in METRICS or f'"ad2kit_{stem}"' in METRICS
        assert literal or (kind == "queue" and f'"{unit}"' in METRICS), name
    places = [tuple(panel["gridPos"].values()) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
