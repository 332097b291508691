"""``apply``, ``plan``, ``diff`` and ``wait``: what is asked of the service, what is shown, how it ends."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import count, repeat
from pathlib import Path
from typing import Any

import pytest

from placement import Deployment, errors
from placement.cli import apply, common
from tests.cli.fake_service import (
    ASKER,
    FakeService,
    described,
    no_room,
    plan,
    report,
    result,
    run,
    standing,
    use,
)


@pytest.fixture
def file(tmp_path: Path) -> str:
    """Deployments a and b."""
    path = tmp_path / "d.yaml"
    path.write_text("deployments: [{name: a, model: m}, {name: b, model: m, replicas: 2}]")
    return str(path)


def lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if line.strip()]


def told(stderr: str) -> dict[str, Any]:
    return dict(json.loads(stderr.splitlines()[-1])["error"])


PLANS = [
    plan("a", 0, change="unchanged", unchanged=[0], placed=[], replaced=[], removed=[], differs=[]),
    plan("b", 0, pending={1: "no room"}, change="new", placed=[0], unchanged=[], replaced=[], removed=[]),
]
PENDING = described("b", 0, pending={1: "no room"})


def look(name: str) -> Any:
    return described("a", 0) if name == "a" else PENDING


APPLIED = [result("a", 0), result("b", 0, pending={1: "no room"})]


def test_what_finds_no_room_waits_and_that_is_no_error(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    after = report(standing("a", 0), standing("b", 0, queue_position=3))
    service = FakeService(status=iter([report(standing("a", 0)), after]), plan_all=PLANS, apply_all=APPLIED)
    use(monkeypatch, service)
    done = run("apply", file)
    assert 0 == done.exit_code, done.output
    assert lines(done.stdout)[:3] == [
        "  = a: unchanged",
        "  + b: new, 2 replicas on a",
        "      replica 1 would wait: no room",
    ]
    assert done.stdout.endswith("\n b: replica 1 is pending, place 3 in the queue: no room\n")
    assert "no room\n\nplaced\n" in done.stdout
    assert lines(done.stderr) == [
        "placing 2 deployments ...",
        "1 replica waits for room; `placement wait NAME` waits for a deployment",
    ]
    [((wanted,), options)] = service.asked("apply_all")
    assert (["a", "b"], {"caller": ASKER}) == ([one.name for one in wanted], options)


def test_all_that_apply_did_is_one_object_of_json(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = report(standing("old", 0), standing("lent", 0, owner={"kind": "caller"}), standing("a", 0))
    after = report(standing("b", 0, queue_position=1))
    service = FakeService(status=iter([before, after]), apply_all=APPLIED)
    use(monkeypatch, service)
    done = run("apply", file, "--json")
    assert (0, "") == (done.exit_code, done.stderr)
    shown = json.loads(done.stdout)
    assert ({}, [], ["old"]) == (shown["failures"], shown["released"], shown["unmanaged"])
    assert [(one["deployment"], one["queue_position"]) for one in shown["deployments"]] == [
        ("a", None),
        ("b", 1),
    ]
    assert not service.asked("plan_all"), "JSON needs no preview"


def test_one_that_fails_does_not_hide_what_became_of_the_others(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = errors.UnknownNode("constraints.gpu_nodes", "x", ("a",))
    partly = errors.PartlyApplied({"b": unknown.to_dict()}, ("a",))
    service = FakeService(
        plan_all=unknown,
        plan=lambda one: PLANS[0] if one.name == "a" else unknown,
        apply_all=partly,
        get=result("a", 0),
        release=AssertionError("nothing is pruned where not all was applied"),
    )
    service.answers["status"] = report(standing("old", 0))
    use(monkeypatch, service)
    done = run("apply", file, "--prune", "--yes")
    assert 1 == done.exit_code
    assert lines(done.stdout)[:3] == [
        "  = a: unchanged",
        f"  ! b: {unknown}",
        "  - old: released; ends 1 running worker",
    ]
    assert " a            0         a" in "\n".join(lines(done.stdout))
    assert "not released, as not all could be applied: old" in done.stderr
    assert done.stderr.endswith(f"error: {partly}\n")
    as_json = run("apply", file, "--json")
    assert (1, ["a"]) == (
        as_json.exit_code,
        [one["deployment"] for one in json.loads(as_json.stdout)["deployments"]],
    )
    assert json.loads(as_json.stdout)["failures"] == {"b": unknown.to_dict()}
    assert ("partly_applied", ["a"]) == tuple(told(as_json.stderr)[key] for key in ("code", "applied"))


def test_atomic_is_asked_of_the_service_and_refuses_before_anything_is_done(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = FakeService(plan_all=no_room("b"), apply_all=no_room("b"))
    use(monkeypatch, service)
    for command in ("apply", "plan"):
        refused = run(command, file, "--atomic")
        assert (1, "", f"error: {no_room('b')}\n") == (refused.exit_code, refused.stdout, refused.stderr)
    assert [{"atomic": True}] * 2 == [options for _, options in service.asked("plan_all")]
    assert not service.asked("apply_all")
    assert 1 == run("apply", file, "--atomic", "--json").exit_code
    [(_, options)] = service.asked("apply_all")
    assert {"atomic": True, "caller": ASKER} == options


def test_a_refusal_of_what_waits_already_says_that_it_goes_on_waiting(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"pending": {"0": "no room"}, "state": "pending", "queue_position": 1}
    waits = report(standing("b", **fields), standing("decode", group="pd", **fields))
    use(monkeypatch, FakeService(status=waits, plan_all=no_room("pd")))
    assert (
        run("apply", file, "--atomic").stderr
        == f"error: {no_room('pd')}; pd goes on waiting as it did before\n"
    )
    use(monkeypatch, FakeService(status=waits, plan_all=no_room("b"), apply_all=no_room("b")))
    said = f"{no_room('b')}; b goes on waiting as it did before"
    refused = run("apply", file, "--atomic")
    assert (1, "", f"error: {said}\n") == (refused.exit_code, refused.stdout, refused.stderr)
    as_json = run("apply", file, "--atomic", "--json")
    assert (1, "", said) == (as_json.exit_code, as_json.stdout, told(as_json.stderr)["message"])


def test_prune_asks_before_anything_is_done_and_releases_what_no_file_names(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stands = report(
        standing("old", 0, 1, owner=None),
        standing("lent", 0, owner={"kind": "job", "job": "01"}),
        standing("gone", state="releasing"),
    )
    service = FakeService(
        status=stands, plan_all=PLANS, apply_all=[result("a", 0), result("b", 0, 1)], release=2
    )
    use(monkeypatch, service)
    for more in ([], ["--json"]):
        unasked = run("apply", file, "--prune", *more)
        assert 2 == unasked.exit_code
        said = (
            "this would release old with 2 replicas, ending their workers, and nobody can be asked; add --yes"
        )
        assert said in unasked.stderr
    monkeypatch.setattr(common, "agreed", lambda *_: False)
    assert (1, True) == ((no := run("apply", file, "--prune")).exit_code, "nothing is changed" in no.stderr)
    assert not service.asked("apply_all")
    done = run("apply", file, "--prune", "--yes")
    assert 0 == done.exit_code
    assert "  - old: released; ends 2 running workers" in lines(done.stdout)
    assert [(("old",), {"caller": ASKER})] == service.asked("release")
    assert lines(done.stdout)[-1] == "released old"
    left = run("apply", file)
    assert "not in these files, left alone: old; --prune releases them" in left.stderr


def test_what_pruning_makes_room_for_is_placed_before_the_results_are_shown(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = FakeService(
        status=report(standing("old", 0)),
        apply_all=APPLIED,
        release=1,
        describe=described("b", 0, 1),
        watch=[],
    )
    use(monkeypatch, service)
    done = run("apply", file, "--prune", "--yes", "--json")
    assert [{}, {}] == [one["pending"] for one in json.loads(done.stdout)["deployments"]]
    assert ["old"] == json.loads(done.stdout)["released"]


def event(number: int, name: str, state: str = "placed", replica: int | None = 1) -> dict[str, Any]:
    return {
        "number": number,
        "at": 0.0,
        "time": "",
        "deployment": name,
        "replica": replica,
        "state": state,
        "text": "on a",
    }


def test_apply_waits_and_tells_each_change(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    service = FakeService(
        plan_all=PLANS,
        apply_all=APPLIED,
        describe=iter([described("a", 0), PENDING, PENDING, described("b", 0, 1)]),
        watch=iter([[event(7, "b", "pending")], [event(9, "b")]]),
    )
    use(monkeypatch, service)
    done = run("apply", "--wait", file)
    assert 0 == done.exit_code, done.output
    assert "b replica 1 placed: on a" in done.stderr
    assert "b replica 1 pending" not in done.stderr, "what is known by now is not told as if it happened now"
    assert "pending" not in lines(done.stdout)[-1]
    [(_, first), (_, second)] = service.asked("watch")
    assert ((0, ["b"]), (7, ["b"])) == tuple((one["since"], one["names"]) for one in (first, second))


@pytest.mark.parametrize(("args", "seconds"), [(["--wait", "0"], 0.0), (["--wait=0"], 0.0)])
def test_a_wait_that_is_not_enough_exits_with_1_and_leaves_the_declaration(
    args: list[str], seconds: float, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = FakeService(plan_all=PLANS, apply_all=APPLIED, describe=look, watch=[])
    use(monkeypatch, service)
    done = run("apply", file, *args)
    assert 1 == done.exit_code
    said = f"error: still pending after {seconds:g} s: 1 replica of b; the deployment goes on waiting; "
    assert lines(done.stderr)[-1].startswith(said)
    as_json = run("apply", file, *args, "--json")
    assert {"b": {"1": "no room"}} == told(as_json.stderr)["pending"]
    assert ("pending", 1) == (told(as_json.stderr)["code"], as_json.exit_code)
    assert ["a", "b"] == [one["deployment"] for one in json.loads(as_json.stdout)["deployments"]]


def test_a_wait_that_is_stopped_says_that_what_is_declared_stays(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = FakeService(plan_all=PLANS, apply_all=APPLIED, describe=look, watch=KeyboardInterrupt())
    use(monkeypatch, service)
    done = run("apply", file, "--wait")
    assert 130 == done.exit_code
    assert lines(done.stderr)[-1].startswith("interrupted; the deployment goes on waiting; `placement wait`")


def test_wait_ends_when_nothing_is_pending_and_tells_what_is_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    pending = described("b", pending={0: "no room"})
    gone = errors.UnknownDeployment("b", ())
    service = FakeService(describe=iter([pending, gone]), watch=repeat([event(3, "b", "ended", None)]))
    use(monkeypatch, service)
    done = run("wait", "b", "--json")
    assert (1, {"deployments": []}) == (done.exit_code, json.loads(done.stdout))
    assert (["b"], {}) == tuple(told(done.stderr)[key] for key in ("gone", "pending"))
    service.answers["describe"] = described("b", 0)
    assert 0 == run("wait", "b").exit_code
    service.answers["members"] = gone
    unknown = run("wait", "b", "--json")
    assert (1, "unknown_deployment", "") == (unknown.exit_code, told(unknown.stderr)["code"], unknown.stdout)


def test_what_is_given_up_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    given_up = described("b", 0, pending={1: "given up: there was no room for 5 s"}, given_up=True)
    use(monkeypatch, FakeService(describe=given_up))
    done = run("wait", "b")
    assert (1, "error: given up, as the deadline is over: 1 replica of b") == (
        done.exit_code,
        lines(done.stderr)[-1],
    )
    assert {"b": {"1": "given up: there was no room for 5 s"}} == told(run("wait", "b", "--json").stderr)[
        "given_up"
    ]


def test_what_is_to_be_replaced_is_waited_for_though_nothing_of_it_is_pending(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outdated = described("b", 0, state="pending", outdated=[0])
    use(monkeypatch, FakeService(describe=outdated, watch=[]))
    done = run("wait", "b", "--timeout", "0")
    said = "error: still pending after 0 s: b, which is to be replaced; "
    assert (1, said) == (done.exit_code, lines(done.stderr)[-1][: len(said)])
    use(
        monkeypatch,
        FakeService(describe=iter([outdated, described("b", 0)]), watch=[event(2, "b")]),
    )
    assert 0 == run("wait", "b").exit_code


def test_waiting_asks_only_after_those_of_which_something_was_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = count()

    def describe(name: str) -> Any:
        return described(name, 0) if next(rounds) > 4 else described(name, pending={0: "no room"})

    heard = iter([[event(1, "a"), event(2, "b")], [event(3, "a")], [event(4, "a")], [event(5, "b")]])
    service = FakeService(describe=describe, watch=heard)
    use(monkeypatch, service)
    assert 0 == run("wait", "a", "b").exit_code
    looked = [args[0] for args, _ in service.asked("describe")]
    assert ["a", "b", "a", "b", "a", "a", "b"] == looked


def test_a_group_is_waited_for_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    service = FakeService(members=lambda name: {"g": ["a", "b"]}.get(name, [name]), describe=look, watch=[])
    use(monkeypatch, service)
    done = run("wait", "b", "g", "--timeout", "0", "--json")
    assert {"b": {"1": "no room"}} == told(done.stderr)["pending"]
    assert ["b", "a"] == [args[0] for args, _ in service.asked("describe")]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"change": "new", "placed": [0, 1]}, "  + a: new, 2 replicas on a"),
        ({"change": "unchanged", "unchanged": [0, 1]}, "  = a: unchanged"),
        (
            {"change": "unchanged", "unchanged": [0], "placed": [1]},
            "  = a: unchanged, replica 1 would get a place on a",
        ),
        ({"change": "changed", "differs": ["budget", "model"]}, "  ~ a: budget, model: changed in place"),
        (
            {"change": "changed", "differs": ["replicas"], "placed": [1]},
            "  ~ a: replicas: replica 1 placed on a",
        ),
        (
            {"change": "changed", "differs": ["replicas"], "removed": [2, 3]},
            "  ~ a: replicas: replicas 2-3 released; ends 8 running workers",
        ),
        (
            {"change": "changed", "differs": ["gpus"], "replaced": [0, 1], "placed": [0, 1]},
            "-/+ a: gpus: replicas 0-1 replaced on a; ends 8 running workers",
        ),
        ({}, "  ~ a: changed in place"),
        ({"standing": True}, "  = a: unchanged"),
    ],
)
def test_each_kind_of_difference_has_its_sign(
    fields: Mapping[str, Any], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "d.toml").write_text('[[deployments]]\nname = "a"\nmodel = "m"\nreplicas = 2\n')
    stands = standing("a", 0, 1, 2, 3)
    for one in stands["assignments"]:
        one |= {"gpus": [0, 1, 2, 3], "bundle_indices": [0, 1, 2, 3]}
    service = FakeService(status=report(stands), plan_all=[plan("a", 0, 1, **fields)])
    use(monkeypatch, service)
    done = run("diff", str(tmp_path))
    assert [line] == lines(done.stdout)
    assert (0 if "  =" in line else 1) == done.exit_code
    as_json = run("diff", str(tmp_path), "--json")
    assert (done.exit_code, "") == (as_json.exit_code, as_json.stderr)
    assert bool(done.exit_code) is json.loads(as_json.stdout)["differs"]


def test_what_no_file_names_is_a_difference_only_where_it_would_be_released(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = [plan(name, 0, change="unchanged") for name in "ab"]
    use(monkeypatch, FakeService(status=report(standing("old", 0)), plan_all=same))
    left, pruned = run("diff", file), run("diff", file, "--prune")
    assert (0, 1) == (left.exit_code, pruned.exit_code)
    assert "not in these files, left alone: old" in left.stderr
    assert "  - old: released; ends 1 running worker" in lines(pruned.stdout)
    planned, pruned = run("plan", file), run("plan", file, "--prune")
    assert "not in these files, left alone: old; --prune releases them\n" == planned.stderr
    assert ("", True) == (pruned.stderr, "  - old: released; ends 1 running worker" in lines(pruned.stdout))


def test_a_plan_says_what_would_wait_and_exits_with_0(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeService(plan_all=PLANS))
    done = run("plan", file)
    assert (0, "") == (done.exit_code, done.stderr)
    assert "      replica 1 would wait: no room" in lines(done.stdout)
    assert "planned, nothing is reserved" in lines(done.stdout)
    [listed] = [json.loads(run("plan", file, "--json").stdout)["deployments"]]
    assert [one.to_dict() for one in PLANS] == listed


def test_progress_counts_the_replicas_of_what_is_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    service: Any = FakeService(status=report(standing("a", 0, 1), standing("other", 0)))
    use(monkeypatch, service)
    wanted = [Deployment(name="a", model="m", replicas=3), Deployment(name="b", model="m")]
    assert apply.how_many_are_placed(service, wanted) == "2 of 4 replicas placed"
