"""The dashboard, the alert rules and the page of the metrics go by the table of the metrics, and by nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from placement import monitoring
from placement.cli.main import main

ROOT = Path(__file__).parents[1]
NAMES = {
    f"{one.exported}{suffix}": one
    for one in monitoring.METRICS
    for suffix in (("_bucket", "_sum", "_count") if one.kind == monitoring.HISTOGRAM else ("",))
}
DASHBOARD = json.loads(monitoring.dashboard())
RULES = [rule for group in yaml.safe_load(monitoring.alerts())["groups"] for rule in group["rules"]]
RAYS = {"SessionName", "ray_io_cluster", "instance", "le"}
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


def expressions() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["definition"]
    for rule in RULES:
        yield rule["expr"]


def table() -> list[str]:
    """The rows of docs/metrics.md."""
    rows = []
    for one in monitoring.METRICS:
        labels = ", ".join(f"`{label}`" for label in one.labels)
        rows.append(f"| `{one.exported}` | {one.kind} | {labels} | {one.unit} | {one.meaning} |")
    return rows


def test_the_page_lists_the_metrics_as_they_are() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert table() == [line for line in page.splitlines() if line.startswith("| `ray_")]
    alerts = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `Placement")]
    assert alerts == [rule["alert"] for rule in RULES]


def test_every_metric_is_on_the_dashboard_and_every_expression_knows_its_labels() -> None:
    shown = set()
    for expression in expressions():
        for name, matchers in re.findall(r"(ray_placement\w+)(?:\{([^}]*)\})?", expression):
            assert name in NAMES, expression
            shown.add(NAMES[name].name)
            of = set(re.findall(r"(\w+)=?[~=]\"", matchers))
            assert of <= {*NAMES[name].labels, *RAYS}, expression
        for labels in re.findall(r"(?:by|on) \(([^)]*)\)", expression):
            known = {
                label for name in re.findall(r"ray_placement\w+", expression) for label in NAMES[name].labels
            }
            assert set(labels.split(", ")) <= known | RAYS, expression
    assert shown == {one.name for one in monitoring.METRICS}


def test_the_dashboard_filters_as_rays_own_do_and_no_panel_lies_on_another() -> None:
    variables = {one["name"] for one in DASHBOARD["templating"]["list"]}
    assert variables == {"datasource", "SessionName", "Cluster", "Instance", "Node", "Deployment"}
    filters = 'SessionName=~"$SessionName",ray_io_cluster=~"$Cluster",instance=~"$Instance"'
    taken: set[tuple[int, int]] = set()
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
        for target in panel.get("targets", ()):
            assert target["expr"].count(filters) == len(re.findall(r"ray_placement", target["expr"]))
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables | {"__rate_interval"}


def test_names_are_as_prometheus_wants_them() -> None:
    assert len({one.name for one in monitoring.METRICS}) == len(monitoring.METRICS)
    for one in monitoring.METRICS:
        assert re.fullmatch(r"placement_[a-z_]+", one.name) and not one.name.endswith("_total")
        assert all(re.fullmatch(r"[a-z_]+", label) for label in one.labels)
        assert (one.kind == monitoring.HISTOGRAM) == bool(one.buckets)
        assert list(one.buckets) == sorted(one.buckets) and one.meaning.endswith(".")


@needs_promtool
def test_prometheus_accepts_the_rules_and_each_fires_when_it_should(tmp_path: Path) -> None:
    (tmp_path / "alerts.yaml").write_text(monitoring.alerts())
    promtool("check", "rules", "alerts.yaml", cwd=tmp_path)
    session = 'SessionName="s"'
    cases = [
        (
            "PlacementGpuLost",
            f'ray_placement_gpus_lost{{{session},node="a"}}',
            "0x10 1x10",
            12,
            {"node": "a"},
        ),
        (
            "PlacementReplicasLost",
            f'ray_placement_replicas{{{session},deployment="d",state="lost"}}',
            "0x4 2x16",
            10,
            {"deployment": "d"},
        ),
        ("PlacementQueueAges", f"ray_placement_queue_oldest_seconds{{{session}}}", "0+60x60", 36, {}),
        (
            "PlacementVerificationFails",
            f'ray_placement_reservations_total{{{session},outcome="interfered"}}',
            "0x10 1+1x20",
            14,
            {},
        ),
        (
            "PlacementServiceSilent",
            f'ray_placement_deployments{{{session},owner="none"}}',
            "0x10 stale",
            13,
            {},
        ),
    ]
    assert [name for name, *_ in cases] == [rule["alert"] for rule in RULES]
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": series, "values": values}],
            "alert_rule_test": [
                {"alertname": name, "eval_time": "3m", "exp_alerts": []},
                {"alertname": name, "eval_time": f"{minute}m", "exp_alerts": [told(name, labels)]},
            ],
        }
        for name, series, values, minute, labels in cases
    ]
    bare = [{key: value for key, value in rule.items() if key != "annotations"} for rule in RULES]
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump({"groups": [{"name": "bare", "rules": bare}]}))
    (tmp_path / "tests.yaml").write_text(yaml.safe_dump({"rule_files": ["bare.yaml"], "tests": tests}))
    promtool("test", "rules", "tests.yaml", cwd=tmp_path)


def told(name: str, labels: dict[str, str]) -> dict[str, Any]:
    """The alert as promtool wants it told."""
    rule = next(rule for rule in RULES if rule["alert"] == name)
    return {"exp_labels": {**rule["labels"], "SessionName": "s", **labels}}


def promtool(*args: str, cwd: Path) -> None:
    done = subprocess.run(["promtool", *args], cwd=cwd, capture_output=True, text=True)
    assert 0 == done.returncode, done.stdout + done.stderr


def test_the_command_prints_each_of_them_without_ray() -> None:
    run = CliRunner().invoke
    assert json.loads(run(main, ["metrics", "grafana"]).output) == DASHBOARD
    assert yaml.safe_load(run(main, ["metrics", "alerts"]).output) == yaml.safe_load(monitoring.alerts())
    assert json.loads(run(main, ["metrics", "alerts", "--json"]).output)["groups"][0]["rules"] == RULES
    listed = json.loads(run(main, ["metrics", "--json"]).output)["metrics"]
    assert [one.exported for one in monitoring.METRICS] == [one["name"] for one in listed]
    shown = run(main, ["metrics"]).output
    assert all(one.exported in shown for one in monitoring.METRICS)
