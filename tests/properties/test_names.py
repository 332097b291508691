"""Text from outside stays text: it cannot leave the service's namespace, a shell, a path or a terminal's line."""

from __future__ import annotations

import io
import shlex
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from rich.console import Console

from placement import topologies
from placement.cli.views.status import status_view
from placement.errors import InvalidDeployment, UnknownDeployment, UnknownNode
from placement.runtime import discovery
from placement.runtime.discovery import TOPOLOGY_LABEL, NodeInfo
from placement.wire.deployment import Deployment
from placement.wire.files import parse_model
from tests.properties.test_service import FOREIGN, DirectService, Group, Ray, make_believe

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,3}", fullmatch=True)
NASTY = st.one_of(
    st.text(max_size=80),
    st.sampled_from(
        ("..", "../../etc/passwd", "a:b", "a/b", "$(id)", "`id`", "a;id", "-rf", "a\nb", "a\x1b[2J", "[red]a", "\0")
    ),
    st.from_regex(r"[A-Za-z0-9._-]{1,64}", fullmatch=True),
)  # fmt: skip


def accepted(**fields: Any) -> Deployment | None:
    try:
        return parse_model(Deployment, {"name": "d", "model": "m", **fields}, "test")
    except InvalidDeployment as refusal:
        assert str(refusal).isprintable() or "\n  " in str(refusal)
        return None


@given(NASTY)
def test_a_name_that_is_accepted_is_harmless_wherever_it_goes(name: str) -> None:
    deployment = accepted(name=name)
    assume(deployment is not None)
    prefix = "placement:0123abcd:"
    assert f"{prefix}{name}:0:ab:1".removeprefix(prefix).partition(":")[0] == name
    assert shlex.quote(name) == name and not name.startswith("-")
    assert Path("/folder", name).resolve().parent == Path("/folder")


@given(NAMES, NAMES)
def test_no_name_reaches_into_the_groups_of_another(one: str, other: str) -> None:
    assume(one != other and accepted(name=one) and accepted(name=other))
    assert not f"placement:0123abcd:{one}:".startswith(f"placement:0123abcd:{other}:")


@pytest.mark.parametrize("method", ["release", "get", "events"])
@given(text=NASTY)
def test_names_that_were_never_placed_change_nothing(method: str, text: str) -> None:
    ray = Ray(nodes={"n"}, groups={"f": Group(FOREIGN, 0)})
    with make_believe(ray):
        service = DirectService()
        before = dict(ray.store), dict(ray.groups)
        with pytest.raises(UnknownDeployment):
            getattr(service, method)(text)
        assert (ray.store, ray.groups) == before


@given(NASTY)
def test_what_names_a_node_is_compared_and_nothing_else(text: str) -> None:
    ray = Ray(nodes={"n"})
    with make_believe(ray):
        service = DirectService()
        wanted = {"name": "d", "model": "m", "constraints": {"gpu_nodes": [text]}}
        if text == "n":
            service.place(wanted)
        else:
            with pytest.raises((UnknownNode, InvalidDeployment)):
                service.place(wanted)
            assert set(ray.store) == {b"token", b"event numbers"}  # the refusal is an event


@given(NASTY)
def test_a_topology_label_opens_no_file_that_is_not_of_the_catalogue(text: str) -> None:
    assume(text not in topologies.names())
    topologies.names()
    with mock.patch.object(topologies, "_text", side_effect=AssertionError("a file was opened")):
        problem = NodeInfo("n", "n", "n", 4, labels={TOPOLOGY_LABEL: text}).label_problem()
    assert problem is not None and "unknown topology" in problem


@given(model=NASTY, node=NASTY)
def test_a_terminal_shows_what_was_written_and_obeys_none_of_it(model: str, node: str) -> None:
    row = {
        "NodeID": "n", "NodeName": node, "NodeManagerAddress": "127.0.0.3", "Alive": True, "Resources": {"GPU": 4.0},
    }  # fmt: skip
    with mock.patch.object(discovery.ray, "nodes", lambda: [row]):
        [info] = discovery.live_nodes()
    ray = Ray(nodes={"n"})
    with make_believe(ray):
        service = DirectService()
        if accepted(model=model, runtime="vllm"):
            service.place({"name": "d", "model": model, "runtime": "vllm"})
        ray.infos = lambda: [info]  # type: ignore[method-assign]
        report = service.queries.status(None, None, None)
    shown = io.StringIO()
    terminal = Console(width=100, file=shown)
    for part in status_view(report):
        terminal.print(part)
    assert all(character.isprintable() or character == "\n" for character in shown.getvalue())


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "m\x1b[2J"},
        {"constraints": {"accelerators": ["H100\n"]}},
        {"constraints": {"node_labels": {"zone": "a\x1b[2J"}}},
        {"constraints": {"node_labels": {"zo\ane": "a"}}},
    ],
)
def test_no_part_of_a_declaration_holds_control_characters(fields: dict[str, Any]) -> None:
    assert accepted(**fields) is None
