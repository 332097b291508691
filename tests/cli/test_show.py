"""``status``, ``list``, ``get``, ``release`` and ``renew``: what is asked, what is shown, how it ends."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from placement import Deployment, Group, errors
from placement.cli import common
from placement.core.routes import Via
from placement.wire.files import parse_deployments
from placement.wire.groups import GroupLink
from tests.cli.fake_service import FakeService, assignment, report, result, run, standing, use
from tests.cli.test_apply import lines, told


def test_filters_are_asked_of_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    service = FakeService()
    use(monkeypatch, service)
    for args, asked in (
        (["status"], {}),
        (["status", "--node", "a", "--state", "lost"], {"node": "a", "state": "lost"}),
        (["status", "--deployment", "d"], {"deployment": "d"}),
        (["list", "--state", "pending"], {"state": "pending"}),
    ):
        service.calls.clear()
        assert 0 == run(*args).exit_code
        assert [((), asked)] == service.asked("status")
    assert 2 == run("status", "--state", "gone").exit_code


def test_status_again_and_again_is_a_report_a_line_in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: waited.append(seconds))
    waited: list[float] = []
    for args, seconds in ((["--watch"], 2.0), (["--watch", "0.5"], 0.5)):
        looks = iter([report(standing("a", 0)), report(), KeyboardInterrupt()])
        use(monkeypatch, FakeService(status=looks))
        done = run("status", "--json", *args)
        assert 130 == done.exit_code
        assert [["a"], []] == [
            [one["name"] for one in json.loads(line)["deployments"]] for line in done.stdout.splitlines()
        ]
        assert [seconds] * 2 == waited
        waited.clear()


def test_a_list_has_a_line_for_each_deployment(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = standing(
        "b", 0, replicas=3, state="pending", pending={"1": "x", "2": "x"}, queue_position=2, age_seconds=7300
    )
    remote = standing("c", 0, owner={"kind": "caller", "job": "02000000", "actor": "0123456789abcdef01"})
    remote["assignments"] = [assignment(gpus=[], egress_resource="egress", egress_units=4)]
    on_cpus = standing("d", 0)
    on_cpus["assignments"] = [assignment(gpus=[], cpus=2.5)]
    use(monkeypatch, FakeService(status=report(standing("a", 0, 1), waits, remote, on_cpus)))
    head, *rows = lines(run("list").stdout)
    assert ["deployment", "placed", "GPUs", "state", "age", "owner"] == head.split()
    assert [
        ["a", "2/2", "2", "placed", "1m", "detached"],
        ["b", "1/3", "1", "pending", "#2", "2h", "detached"],
        ["c", "1/1", "-", "placed", "1m", "caller", "012345…def01"],
        ["d", "1/1", "-", "placed", "1m", "detached"],
    ] == [row.split() for row in rows]
    as_json = json.loads(run("list", "-o", "json").stdout)["deployments"]
    assert [("a", 2, 2, None), ("b", 1, 3, 2), ("c", 1, 1, None), ("d", 1, 1, None)] == [
        (one["name"], one["placed"], one["replicas"], one["queue_position"]) for one in as_json
    ]
    assert as_json == json.loads(run("list", "--json").stdout)["deployments"]
    use(monkeypatch, FakeService())
    assert "no deployments like that\n" == run("list", "--state", "lost").stdout


DESCRIBED = {
    "deployment": {"name": "b", "model": "org/m: large", "replicas": 2, "constraints": {"gpu_nodes": ["a"]}},
    "result": result("b", 0, pending={1: "no\nroom"}).to_dict(),
    "generation": 4,
    "state": "pending",
    "age_seconds": 300.0,
    "owner": "detached",
}


def test_what_get_prints_as_yaml_can_be_applied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    other: dict[str, Any] = {
        **DESCRIBED,
        "deployment": {"name": "a", "model": "m"},
        "result": result("a", 0).to_dict(),
    }
    service = FakeService(describe=lambda name: DESCRIBED if name == "b" else other)
    use(monkeypatch, service)
    text = run("get", "b", "a", "b", "-o", "yaml").stdout
    assert ["b", "a"] == [one.name for one in parse_deployments(text, ".yaml", "stdout")]
    assert DESCRIBED["deployment"] == yaml.safe_load(text)["deployments"][0]
    assert text.splitlines()[1:4] == [
        "# b: pending, 1 of 2 replicas, generation 4, 5m old, owner detached",
        "# replica 0 on a: GPU 0",
        "# replica 1 is pending: no room",
    ]
    assert {"deployments": [DESCRIBED]} == json.loads(run("get", "b", "-o", "json").stdout)
    shown = lines(run("get", "b").stdout)
    assert "b: pending, 1 of 2 replicas, generation 4, 5m old, owner detached" == shown[0]
    assert "  model: 'org/m: large'" in shown


def test_a_group_is_got_by_its_name_and_can_be_applied_again(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group(name="g", members={"a": 1, "b": 2}, links=(GroupLink(between=("a", "b"), via=Via.PCIE),))
    wanted = {one.name: one for one in group.of([Deployment(name=name, model="org/m") for name in "ab"])}

    def describe(name: str) -> dict[str, Any]:
        declared = wanted[name].model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        return {**DESCRIBED, "deployment": declared, "result": result(name, 0).to_dict()}

    use(
        monkeypatch,
        FakeService(members=lambda name: ["a", "b"] if name == "g" else [name], describe=describe),
    )
    text = run("get", "g", "b", "-o", "yaml").stdout
    assert [*wanted.values()] == parse_deployments(text, ".yaml", "stdout")


def test_get_of_what_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeService(describe=errors.UnknownDeployment("x", ("a",))))
    refused = run("get", "x", "--json")
    assert (1, "", "unknown_deployment") == (refused.exit_code, refused.stdout, told(refused.stderr)["code"])


def test_release_all_asks_and_says_what_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    service = FakeService(status=report(standing("a", 0, 1), standing("b", 0)), release_all=["a", "b"])
    use(monkeypatch, service)
    unasked = run("release", "--all")
    assert 2 == unasked.exit_code
    said = "this would release 2 deployments with 3 replicas, ending their workers, and nobody can be asked; add --yes"
    assert said in unasked.stderr
    monkeypatch.setattr(common, "agreed", lambda *_: False)
    assert (1, "") == ((no := run("release", "--all")).exit_code, no.stdout)
    assert not service.asked("release_all")
    assert "released a, b\n" == run("release", "--all", "--yes").stdout
    assert {"released": {"a": 2, "b": 1}} == json.loads(run("release", "--all", "--yes", "--json").stdout)
    for wrong in (["release"], ["release", "--all", "a"]):
        assert 2 == run(*wrong).exit_code


@pytest.mark.parametrize(
    ("released", "said"),
    [
        (0, "it waited for room, and is no longer in the queue"),
        (2, "2 replicas; 1 more waited for room, and left the queue"),
        (3, "3 replicas"),  # it was placed meanwhile
    ],
)
def test_a_release_says_what_left_the_queue(
    monkeypatch: pytest.MonkeyPatch, released: int, said: str
) -> None:
    waits = standing("a", replicas=3, queue_position=1, pending={"2": "no room"}, state="pending")
    use(monkeypatch, FakeService(status=report(waits), release=released))
    assert f"released a: {said}\n" == run("release", "a").stdout


def test_a_release_of_what_holds_nothing_and_does_not_wait_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {**report(), "unreadable": [{"name": "a", "problem": "broken"}]}
    use(monkeypatch, FakeService(status=broken, release=0))
    assert "released a: 0 replicas\n" == run("release", "a").stdout


def test_a_release_of_an_unknown_name_says_which_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    grouped = {**report(standing("prefill", 0, group="pd")), "groups": [{"name": "pd"}]}
    use(monkeypatch, FakeService(status=grouped))
    said = "error: no deployment 'prefil' (did you mean prefill?); there are: pd, prefill; nothing was released\n"
    assert (1, said) == ((refused := run("release", "prefil")).exit_code, refused.stderr)


def test_renew_renews_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    service = FakeService(renew=lambda name: 0.0 if name == "a" else None)
    use(monkeypatch, service)
    assert {"renewed": {"a": 0.0, "b": None}} == json.loads(run("renew", "a", "b", "a", "--json").stdout)
    assert [(("a",), {}), (("b",), {})] == service.asked("renew")
    service.answers["renew"] = iter([None, errors.UnknownDeployment("x", ())])
    refused = run("renew", "a", "x")
    assert (1, "a stays without limit: it has no ttl_seconds\n") == (refused.exit_code, refused.stdout)
    assert refused.stderr.endswith("; renewed before: a\n")


ON_A_TERMINAL = """
import sys
from contextlib import nullcontext
from tests.cli.fake_service import FakeService, described, report, standing
from placement.cli import common
from placement.cli.main import main
service = FakeService(
    status=report(*(standing(f"d-{i:03}", 0) for i in range(200))),
    describe=described("b", 0, pending={1: "no\\x1b[31m\\nroom " + 99 * "x"}),
    watch=[],
)
common.service = lambda address: nullcontext(service)
common.ask = lambda answer, tell=None: answer
main(sys.argv[1:])
"""


def on_a_terminal(args: list[str], stop_at: bytes = b"", **env: str) -> tuple[int, bytes]:
    """How a command exits, and what a terminal of 80 x 24 is shown; interrupted once it shows ``stop_at``."""
    leader, follower = pty.openpty()
    command = [sys.executable, "-c", ON_A_TERMINAL, *args]
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24", **env}
    child = subprocess.Popen(command, stdin=follower, stdout=follower, stderr=follower, env=env)
    os.close(follower)
    shown = b""
    while select.select([leader], [], [], 60)[0]:
        try:
            shown += os.read(leader, 65536)
        except OSError:  # the other end is closed
            break
        if stop_at and stop_at in shown:
            stop_at = b""
            child.send_signal(signal.SIGINT)
    os.close(leader)
    return child.wait(timeout=60), shown


@pytest.mark.parametrize(("args", "paged"), [([], True), (["--json"], False)])
def test_a_terminal_is_shown_a_screen_at_a_time(args: list[str], paged: bool, tmp_path: Path) -> None:
    pager = tmp_path / "pager"
    pager.write_text("#!/bin/sh\nread line\necho PAGER STARTED\ncat > /dev/null\n")
    pager.chmod(0o755)
    exits, shown = on_a_terminal(["list", *args], PAGER=str(pager))
    assert (0, paged, not paged) == (exits, b"PAGER STARTED" in shown, b"d-199" in shown)


def test_without_a_pager_all_of_it_is_shown() -> None:
    for pager in ("", "no-such-program"):
        exits, shown = on_a_terminal(["list"], PAGER=pager)
        assert (0, True) == (exits, b"d-199" in shown)


def test_who_watches_sees_it_on_a_screen_of_its_own_which_is_left_at_the_end() -> None:
    exits, shown = on_a_terminal(["status", "--watch", "0.1"], stop_at=b"200 replicas")
    assert 130 == exits
    enter, leave = b"\x1b[?1049h", b"\x1b[?1049l"
    assert shown.index(enter) < shown.index(b"200 replicas") < shown.index(leave)


def test_who_waits_sees_one_line_that_is_written_anew() -> None:
    exits, shown = on_a_terminal(["wait", "b"], stop_at=b" (1 s)")
    assert 130 == exits
    progress = shown[: shown.index(b"interrupted")]
    assert b"\n" not in progress.replace(b"^C", b"").strip(), progress
    lines = [line.decode() for line in progress.split(b"\r\x1b[K")]
    assert lines[1].startswith("1 replica pending; b/1: no[31m room xxx") and lines[1].endswith("x (1 s)")
    assert max(map(len, lines)) == 79
    assert "" == lines[-1]
