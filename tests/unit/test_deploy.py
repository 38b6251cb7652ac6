"""The files for operators name what the service has."""

from __future__ import annotations

import ast
import copy
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kubernetes_validate
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from ad2kit.service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVING = Path(__file__).parents[2] / "serving"
DEPLOY = SERVING / "deploy"
# Read and not imported: BentoML takes a second.
CONSTANTS = {
    node.targets[0].id: node.value
    for node in ast.parse((SERVING / "service.py").read_text()).body
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
}
MANIFEST = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
(GROUP,) = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["spec"]["groups"]
ALERTS = GROUP["rules"]
DASHBOARD = json.loads((DEPLOY / "grafana.json").read_text())
METRICS = (Path(__file__).parents[2] / "ad2kit" / "service" / "monitoring.py").read_text()


def of_kind(kind: str) -> dict[str, Any]:
    (found,) = [each for each in MANIFEST if each["kind"] == kind]
    return dict(found)


@pytest.mark.parametrize("resource", MANIFEST, ids=lambda each: each["kind"])
@pytest.mark.parametrize("version", ["1.31", kubernetes_validate.latest_version()])
def test_the_manifest_fits_the_schema_of_kubernetes(resource: Any, version: str) -> None:
    kubernetes_validate.validate(resource, version, strict=True)


def test_the_schema_refuses_a_misspelt_key() -> None:
    wrong = copy.deepcopy(of_kind("Deployment"))
    wrong["spec"]["template"]["spec"]["terminationGracePeriod"] = 30
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriod"):
        kubernetes_validate.validate(wrong, kubernetes_validate.latest_version(), strict=True)


def test_selectors_and_references_meet() -> None:
    pod = of_kind("Deployment")["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert of_kind("Deployment")["spec"]["selector"]["matchLabels"] == labels
    assert of_kind("Service")["spec"]["selector"] == labels
    assert of_kind("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert of_kind("NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == labels
    (spread,) = pod["spec"]["topologySpreadConstraints"]
    assert spread["labelSelector"]["matchLabels"] == labels
    target = of_kind("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert target["name"] == of_kind("Deployment")["metadata"]["name"]
    (container,) = pod["spec"]["containers"]
    ports = {port["name"] for port in container["ports"]}
    assert {of_kind("Service")["spec"]["ports"][0]["targetPort"]} == ports
    (ingress,) = of_kind("NetworkPolicy")["spec"]["ingress"]
    assert {port["port"] for port in ingress["ports"]} == ports
    # The root file system is read-only: what is written has a volume.
    assert container["securityContext"]["readOnlyRootFilesystem"]
    (volume,), (mount,) = pod["spec"]["volumes"], container["volumeMounts"]
    assert mount == {"name": volume["name"], "mountPath": "/tmp"}  # noqa: S108  (of the container)


def test_an_alert_says_what_it_is() -> None:
    for rule in ALERTS:
        assert rule.keys() == {"alert", "expr", "for", "labels", "annotations"}
        assert rule["annotations"].keys() == {"summary"}
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert re.fullmatch(r"\d+[mh]", rule["for"])
        assert rule["expr"].count("(") == rule["expr"].count(")")


def test_a_pod_is_not_killed_while_it_answers() -> None:
    pod = of_kind("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    _, delay_s = container["lifecycle"]["preStop"]["exec"]["command"]
    assert pod["terminationGracePeriodSeconds"] > int(delay_s) + Settings().deadline_s
    for probe in ("readinessProbe", "startupProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["path"] in ast.literal_eval(CONSTANTS["PUBLIC"])


def lost(given: Any, read: Any, place: str = "") -> Iterator[str]:
    """The places where what Grafana's own model has read is not what the file says."""
    if isinstance(given, dict):
        for key, value in given.items():
            if isinstance(read, dict) and key in read:
                yield from lost(value, read[key], f"{place}/{key}")
            else:
                yield f"{place}/{key}"
    elif isinstance(given, list) and isinstance(read, list) and len(given) == len(read):
        for row, (mine, theirs) in enumerate(zip(given, read, strict=True)):
            yield from lost(mine, theirs, f"{place}/{row}")
    elif given != read:
        yield place


def as_grafana_reads_it(content: dict[str, Any]) -> Any:
    register_default_plugins()
    return json.loads(JSONEncoder().encode(Dashboard.from_json(content)))


def test_grafana_reads_every_key_of_the_dashboard() -> None:
    assert list(lost(DASHBOARD, as_grafana_reads_it(DASHBOARD))) == []
    wrong = copy.deepcopy(DASHBOARD)
    wrong["panels"][0]["fieldConfigs"] = wrong["panels"][0].pop("fieldConfig")
    assert list(lost(wrong, as_grafana_reads_it(wrong))) == ["/panels/0/fieldConfigs"]


def test_what_operators_read_names_every_setting_and_no_other() -> None:
    settings = {f"AD2KIT_{name.upper()}" for name in Settings.model_fields}
    guide = (SERVING.parent / "docs/guides/operating.md").read_text()
    said = set(re.findall(r"AD2KIT_[A-Z_]+", guide))
    assert said == settings
    assert set(re.findall(r"AD2KIT_[A-Z_]+", (DEPLOY / "kubernetes.yaml").read_text())) < settings


def test_dashboard_and_alerts_ask_for_metrics_that_there_are() -> None:
    expressions = [
        target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]
    ] + [rule["expr"] for rule in ALERTS]
    for name in {name for each in expressions for name in re.findall(r"ad2kit_(\w+)", each)}:
        stem = re.sub("_(total|bucket|sum|count)$", "", name)
        kind, _, unit = stem.partition("_")
        literal = f'"{stem}"' in METRICS or f'"ad2kit_{stem}"' in METRICS
        assert literal or (kind == "queue" and f'"{unit}"' in METRICS), name
    places = [tuple(panel["gridPos"].values()) for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)
