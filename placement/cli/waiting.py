"""``placement wait``, and how ``placement apply --wait`` waits: until nothing of a deployment is pending."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import click

from placement import errors
from placement.cli import common
from placement.cli.group import Command, NotDone
from placement.cli.progress import Progress
from placement.errors import counted

WAITS_ON = "the deployment goes on waiting; `placement wait` waits for it, `placement release` gives it up"
WATCH_SECONDS = 30.0
"""How long one question to the service may take."""

Results = dict[str, dict[str, Any]]
"""Deployment -> its result as JSON-ready values."""


@dataclass
class Waited:
    """The outcome of waiting for deployments.

    Attributes:
        results: of the deployments that exist.
        pending: deployment -> replica -> why, of those that still wait.
        given_up: the same, of those whose deadline is over.
        gone: deployments that no longer exist: released, or given up before any replica was placed.
    """

    results: Results = field(default_factory=dict)
    pending: dict[str, dict[str, str]] = field(default_factory=dict)
    given_up: dict[str, dict[str, str]] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)


@click.command(cls=Command, epilog="\b\nExample:\n  placement wait llama-70b --timeout 600")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@click.option(
    "--timeout",
    type=common.Seconds(min=0),
    default=math.inf,
    metavar="SECONDS",
    help="Wait this long at most; without it, as long as it takes.",
)
@common.with_address
@common.with_json
def wait(names: tuple[str, ...], timeout: float, address: str | None, as_json: bool) -> None:
    """Waits until deployments are placed as they are declared. NAME is a deployment or a group.

    Exits with 1 if they are not placed in time.
    """
    with common.service(address) as service:
        waited = until_placed(service, common.members(service, names), timeout, not as_json)
    if as_json:
        common.dump({"deployments": [*waited.results.values()]})
    else:
        from placement.cli.views.tables import assignments_table

        common.show(assignments_table(waited.results.values(), title="placed"))
    require_placed(waited, timeout)


def until_placed(service: Any, names: Iterable[str], seconds: float, tells: bool) -> Waited:
    """Waits until no replica of some deployments is pending or to be replaced, or the time is over.

    Args:
        service: the handle.
        names: of the deployments.
        seconds: how long at most.
        tells: shows the progress on stderr.
    """
    with common.noted(KeyboardInterrupt, WAITS_ON), Progress("waiting", tells) as progress:
        end = time.monotonic() + seconds
        waiting = list(dict.fromkeys(names))
        waited = Waited()
        changed, seen = set(waiting), 0
        while True:
            for name in [name for name in waiting if name in changed]:
                if _look(service, name, waited):
                    waiting.remove(name)
            left = end - time.monotonic()
            if not waiting or left <= 0:
                return waited
            progress.say(_pending(waited))
            timeout = min(left, WATCH_SECONDS)
            happened = common.ask(service.watch.remote(since=seen, names=[*waiting], timeout_seconds=timeout))
            for event in happened if seen and tells and not progress.is_shown else ():
                _happened(event)
            seen = max((event["number"] for event in happened), default=seen)
            changed = {event["deployment"] for event in happened} or set(waiting)


def _look(service: Any, name: str, waited: Waited) -> bool:
    """Records the state of a deployment; returns whether there is nothing more to wait for."""
    waited.pending.pop(name, None)
    try:
        described = common.ask(service.describe.remote(name))
    except errors.UnknownDeployment:
        waited.results.pop(name, None)
        waited.gone.append(name)
        return True
    result = waited.results[name] = described["result"]
    if described["state"] not in ("pending", "releasing"):
        return True
    if described.get("given_up"):
        waited.given_up[name] = result["pending"]
        return True
    waited.pending[name] = result["pending"]
    return False


def require_placed(waited: Waited, seconds: float) -> None:
    """Checks that all replicas of all of them are placed as they are declared.

    Raises:
        NotDone: they are not.
    """
    said = []
    if waited.pending:
        within = "" if math.isinf(seconds) else f" after {seconds:g} s"
        said.append(f"still pending{within}: {_each(waited.pending)}; {WAITS_ON}")
    if waited.given_up:
        said.append(f"given up, as the deadline is over: {_each(waited.given_up)}")
    if waited.gone:
        said.append(f"released, or given up: {', '.join(waited.gone)}; `placement events NAME` says why")
    if said:
        fields = {"pending": waited.pending, "given_up": waited.given_up, "gone": waited.gone}
        raise NotDone("pending", "; ".join(said), fields)


def _each(pending: Mapping[str, Mapping[str, str]]) -> str:
    """``2 replicas of a, b to be replaced``."""
    return ", ".join(
        f"{counted(len(one), 'replica')} of {name}" if one else f"{name}, which is to be replaced"
        for name, one in pending.items()
    )


def _happened(event: Mapping[str, Any]) -> None:
    """Tells an event, where there is no terminal on which a line can be written anew."""
    who = "" if event["replica"] is None else f" replica {event['replica']}"
    common.note(f"{event['deployment']}{who} {event['state']}: {event['text']}".rstrip(": "))


def _pending(waited: Waited) -> str:
    """``2 replicas pending; a/0: why``."""
    pending = [(name, *one) for name, replicas in waited.pending.items() for one in replicas.items()]
    text = f"{counted(len(pending), 'replica')} pending"
    if pending:
        name, replica, why = pending[0]
        text += f"; {name}/{replica}: {' '.join(why.split())}"
    return text
