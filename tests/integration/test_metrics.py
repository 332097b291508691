"""A real Prometheus scrapes a simulated cluster, found by Ray's own list of targets; what it says is what is."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

import placement
from placement import monitoring
from placement.runtime.embedded import EmbeddedCluster, SimulatedNode, embedded_cluster, free_port
from placement.runtime.ray_internals import minor_version
from tests.integration.conftest import settled

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]

CONFIG = """\
global: {scrape_interval: 1s, evaluation_interval: 1s}
rule_files: [alerts.yaml]
scrape_configs:
  - job_name: ray
    file_sd_configs: [{files: ["TARGETS"], refresh_interval: 1s}]
"""
CHANGED = {"RAY_enable_metrics_collection": "1", "RAY_metrics_report_interval_ms": "1000"}
Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def cluster() -> Iterator[EmbeddedCluster]:
    nodes = [SimulatedNode("pcie", topology="a100-pcie-4x"), SimulatedNode("dies", gpus=1)]
    with (
        mock.patch.dict(os.environ, CHANGED),
        embedded_cluster(nodes, dashboard=True) as running,
    ):
        yield running


@pytest.fixture(scope="module")
def ask(cluster: EmbeddedCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Asks Prometheus: ``ask("query", query="up")``."""
    folder = tmp_path_factory.mktemp("prometheus")
    node = ray._private.worker.global_worker.node
    is_old = minor_version(ray.__version__) < (2, 57)
    session = node.get_temp_dir_path() if is_old else node.get_session_dir_path()
    targets = Path(session, "prom_metrics_service_discovery.json")
    (folder / "alerts.yaml").write_text(monitoring.alerts())
    (folder / "prometheus.yml").write_text(CONFIG.replace("TARGETS", str(targets)))
    url = f"127.0.0.1:{free_port('127.0.0.1')}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(what: str, **parameters: str) -> Any:
        query = urllib.parse.urlencode(parameters)
        with opener.open(f"http://{url}/api/v1/{what}?{query}", timeout=30) as answer:
            told = json.load(answer)
        assert told["status"] == "success", told
        return told["data"]

    def answers() -> bool:
        try:
            return bool(ask("query", query="up"))
        except OSError:
            return False

    server = subprocess.Popen(
        ["prometheus", f"--web.listen-address={url}", f"--storage.tsdb.path={folder / 'data'}",
         f"--config.file={folder / 'prometheus.yml'}", "--log.level=warn"],
    )  # fmt: skip
    try:
        assert settled(lambda: targets.exists() and answers(), 120)
        yield ask
    finally:
        server.terminate()
        server.wait(30)


def values(ask: Ask, query: str) -> dict[tuple[str, ...], float]:
    """The labels of each series, by their names' order, but for those of Ray -> its value."""
    told = ask("query", query=query)["result"]
    return {tuple(v for _, v in sorted(one["metric"].items())): float(one["value"][1]) for one in told}


def tells(ask: Ask, query: str, expected: Mapping[Any, float]) -> None:
    """That Prometheus says so; what happened just now reaches it within seconds, each metric at its own time."""
    assert settled(lambda: values(ask, query) == expected, 120), (values(ask, query), expected)


GPUS = "max by (node, state) (ray_placement_gpus) > 0"


@pytest.mark.timeout(900)  # a busy machine starts raylets, a dashboard and Prometheus in minutes
def test_prometheus_says_what_status_says_and_the_dashboard_and_the_alerts_work(
    cluster: EmbeddedCluster, ask: Ask
) -> None:
    theirs = placement_group([{"GPU": 1}], bundle_label_selector=[{"ray.io/node-id": node_id("pcie")}])
    ray.get(theirs.ready(), timeout=60)
    client = placement.Client.start()
    on_pcie = {"model": "m", "constraints": {"gpu_nodes": ["pcie"]}}
    pair = client.place({**on_pcie, "name": "pair", "gpus": 2, "owner": "job"})
    client.place({**on_pcie, "name": "quarter", "gpus": 0.25})
    client.apply({"name": "moves", "model": "m", "gpus": 1, "replicas": 2})
    with pytest.raises(placement.errors.NotEnoughGpus):
        client.place({"name": "never", "model": "m", "gpus": 8})

    status = client.status()
    totals = {key: status["totals"][key] for key in ("gpus", "free", "held", "other")}
    assert totals == {"gpus": 5, "free": 0, "held": 4, "other": 1}
    on_node = {("pcie", "placed"): 2, ("pcie", "shared"): 1, ("pcie", "foreign"): 1}
    tells(ask, GPUS, {**on_node, ("dies", "placed"): 1})
    states = [(one["name"], each["state"]) for one in status["deployments"] for each in one["replica_states"]]
    assert ("moves", "pending") in states
    replicas = {one: states.count(one) for one in states}
    tells(ask, "max by (deployment, state) (ray_placement_replicas) > 0", replicas)
    tells(ask, "max by (owner) (ray_placement_deployments) > 0", {("job",): 1, ("none",): 2})
    tells(ask, "max by (kind) (ray_placement_queue_length)", {("deployment",): 1, ("call",): 0})
    tells(ask, "0 < max(ray_placement_queue_oldest_seconds) < bool 3600", {(): 1})
    tells(ask, "sum by (code) (ray_placement_refusals_total)", {("not_enough_gpus",): 1})
    speed = (pair.assignments[0].bandwidth_gb_per_s or 0) * 1e9
    tells(ask, "max by (deployment) (ray_placement_allreduce_bytes_per_second)", {("pair",): speed})
    tells(ask, "max by (deployment) (ray_placement_allreduce_best_ratio)", {("pair",): 1})

    # What is released is not told of any more; what is lost with its node is placed again.
    client.release("pair")
    cluster.kill("dies")
    tells(ask, "sum(ray_placement_recovery_seconds_count)", {(): 1})
    tells(ask, 'ray_placement_replicas{deployment="pair"} or ray_placement_gpus{node="dies"}', {})
    tells(ask, GPUS, on_node)
    reserved = 'sum(ray_placement_reservations_total{outcome="reserved"})'
    tells(ask, f"{reserved} - sum(ray_placement_duration_seconds_count)", {(): 0})
    tells(ask, "sum(ray_placement_steering_attempts_count) >= bool 5", {(): 1})

    client.release("moves")
    client.place({**on_pcie, "name": "another", "gpus": 2})
    every_expression_answers(ask)
    client.release_all()
    remove_placement_group(theirs)


def node_id(name: str) -> str:
    return next(row["NodeID"] for row in ray.nodes() if row["NodeName"] == name)


def every_expression_answers(ask: Ask) -> None:
    """Those of the dashboard with data, as soon as Prometheus has two samples; the alerts without an error."""
    dashboard = json.loads(monitoring.dashboard())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    silent = lambda: [one for one in expressions if not expressed(ask, one)]  # noqa: E731
    assert settled(lambda: not silent(), 120), silent()
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            [(series, label)] = re.findall(r"label_values\((.*), (\w+)\)", variable["definition"])
            assert any(label in one["metric"] for one in expressed(ask, series)) or label == "ray_io_cluster"
    assert settled(lambda: all(one["health"] == "ok" for one in rules(ask)), 120), rules(ask)
    assert 5 == len(rules(ask))


def expressed(ask: Ask, expr: str) -> list[Any]:
    for name, value in {"__rate_interval": "5m", "Cluster": ".*"}.items():
        expr = expr.replace(f"${name}", value)
    return list(ask("query", query=re.sub(r"\$\w+", ".+", expr))["result"])


def rules(ask: Ask) -> list[Any]:
    return [rule for group in ask("rules")["groups"] for rule in group["rules"]]
