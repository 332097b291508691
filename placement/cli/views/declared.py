"""What was declared of a deployment, and where its replicas are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from placement.cli.views.console import age_text, owner_text
from placement.cli.views.status import STYLES
from placement.cli.views.tables import assignments_table, holds
from placement.errors import counted

Described = Mapping[str, Any]
"""A declaration with its result, its state and its age, as the service describes it."""


def declared_yaml(described: Iterable[Described]) -> str:
    """A file that can be applied again, with where the replicas are as comments."""
    lines = ["deployments:"]
    for one in described:
        lines += [f"# {line}" for line in (_heading(one), *_places(one["result"]))]
        lines += _yaml([one["deployment"]]).splitlines()
    return "\n".join(lines) + "\n"


def declared_view(one: Described) -> list[RenderableType]:
    """The state, the fields that were declared, and the places."""
    heading = Text(one["deployment"]["name"], style="bold")
    heading.append(f": {_state(one)}", style=STYLES.get(one.get("state", ""), "not bold"))
    fields = {name: value for name, value in one["deployment"].items() if name != "name"}
    result = {**one["result"], "deployment": one["deployment"]["name"]}
    return [
        heading,
        Padding(Text(_yaml(fields).rstrip()), (0, 0, 0, 2), expand=False),
        assignments_table([result], title="placed"),
    ]


def _yaml(value: Any) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
    return text


def _heading(one: Described) -> str:
    return f"{one['deployment']['name']}: {_state(one)}"


def _state(one: Described) -> str:
    """``placed, 2 of 3 replicas, generation 4, 5h old, owner detached``."""
    result = one["result"]
    placed = len({a["replica_index"] for a in result["assignments"]})
    total = one["deployment"].get("replicas", 1)
    said = [one.get("state") or ("pending" if result["pending"] else "placed")]
    said.append(f"{placed} of {counted(total, 'replica')}")
    if one.get("generation") is not None:
        said.append(f"generation {one['generation']}")
    if one.get("age_seconds") is not None:
        said.append(f"{age_text(one['age_seconds'])} old")
    if "owner" in one:
        said.append(f"owner {owner_text(one['owner'])}")
    return ", ".join(said)


def _places(result: Mapping[str, Any]) -> list[str]:
    """Each replica in a line."""
    places = [f"replica {a['replica_index']} on {a['node_name']}: {holds(a)}" for a in result["assignments"]]
    waits = [
        f"replica {index} is pending: {' '.join(str(why).split())}"
        for index, why in result["pending"].items()
    ]
    return places + waits
