"""The ``placement`` command. Ray and pydantic are imported by the commands that need them, so that help is instant."""

from __future__ import annotations

import errno
import json
import math
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from placement import __version__, errors
from placement.cli import streams
from placement.errors import counted

DONE, REFUSED, BAD_INPUT, NO_SERVICE = 0, 1, 2, 3
_AS_JSON, _SIGNAL = "placement.as_json", "placement.signal"
_GOES_ON = (
    "the placement service goes on; `placement status` shows what stands, `placement release` gives it back"
)
POLICIES = ("topology", "fragmentation", "pack", "spread", "round_robin", "least_loaded")
"""As :class:`placement.core.snapshot.Policy` has them; a test compares the two."""

_EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (errors.InvalidDeployment, BAD_INPUT),
    (errors.InvalidClusterFile, BAD_INPUT),
    (errors.UnknownTopology, BAD_INPUT),
    (errors.MatrixError, BAD_INPUT),
    (errors.ClusterUnreachable, NO_SERVICE),
    (errors.ServiceNotRunning, NO_SERVICE),
    (errors.PlacementError, REFUSED),
)

EPILOG = """\b
Exit codes:
  0    done
  1    refused: it does not fit, others were in the way, the name is not known, or the
       service runs with other settings or in another version
  2    bad input: a file, a field or an option
  3    no Ray cluster at the address, or no placement service on it
  130  interrupted
  143  stopped by SIGTERM

\b
Example:
  ray start --head --num-gpus=8
  placement up
  placement apply deployments.toml
"""


def exit_code(kind: type[errors.PlacementError]) -> int:
    """What a command that fails with such an error exits with."""
    return next(code for base, code in _EXIT_CODES if issubclass(kind, base))


class Command(click.Command):
    """A command that alone prints to stdout; SIGTERM ends it as Ctrl-C does."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs it."""
        with streams.kept_apart(), _sigterm_interrupts(ctx):
            return super().invoke(ctx)


class Commands(click.Group):
    """Turns errors into one line on stderr, or JSON where ``--json`` was given, and an exit code."""

    command_class = Command

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Runs; a full disk, or a closed stream, is no fault of the program."""
        streams.open_closed()
        try:
            return super().main(*args, **kwargs)
        except OSError as error:
            if not streams.is_full(error):
                raise
            streams.give_up()
            what = f"cannot write the output: {error.strerror}; make room, or write it elsewhere"
            told = {"code": "output", "type": type(error).__name__, "message": what}
            _tell_error("--json" in (kwargs.get("args") or sys.argv), told)
            sys.exit(REFUSED)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Notes whether JSON is asked for, since a command that fails to parse cannot say so."""
        ctx.meta[_AS_JSON] = "--json" in args
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            if not ctx.meta[_AS_JSON]:
                raise
            _tell_error(True, _usage(error))
            ctx.exit(BAD_INPUT)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command."""
        as_json = ctx.meta[_AS_JSON]
        try:
            return super().invoke(ctx)
        except errors.PlacementError as error:
            _tell_error(as_json, error.to_dict(), error)
            ctx.exit(exit_code(type(error)))
        except click.UsageError as error:
            if not as_json:
                raise
            _tell_error(as_json, _usage(error))
            ctx.exit(BAD_INPUT)
        except (KeyboardInterrupt, click.Abort) as error:
            told = {"code": "interrupted", "type": "KeyboardInterrupt", "message": "interrupted"}
            _tell_error(as_json, told, error, prefix="")
            ctx.exit(128 + ctx.meta.get(_SIGNAL, signal.SIGINT))
        except Exception as error:
            of_output = isinstance(error, OSError) and (error.errno == errno.EPIPE or streams.is_full(error))
            if not as_json or of_output or isinstance(error, click.exceptions.Exit):
                raise
            told = {"code": "unexpected", "type": type(error).__name__, "message": str(error)}
            _tell_error(as_json, {**told, "traceback": traceback.format_exc()}, error)
            ctx.exit(REFUSED)


def _usage(error: click.UsageError) -> dict[str, Any]:
    return {"code": "usage", "type": type(error).__name__, "message": error.format_message()}


def _tell_error(
    as_json: bool, told: dict[str, Any], error: BaseException | None = None, prefix: str = "error: "
) -> None:
    """One line of JSON, so that it can be told from what Ray may have said before; or the message with its notes."""
    message = "; ".join([told["message"], *getattr(error, "__notes__", ())])
    click.echo(json.dumps({"error": {**told, "message": message}}) if as_json else prefix + message, err=True)


@contextmanager
def _noted(kind: type[BaseException], note: str) -> Iterator[None]:
    """Has what ends the block say one thing more."""
    try:
        yield
    except kind as error:
        error.add_note(note)
        raise


@contextmanager
def _sigterm_interrupts(ctx: click.Context) -> Iterator[None]:
    def interrupt(number: int, _: object) -> None:
        ctx.meta[_SIGNAL] = number
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _address(command: Callable[..., Any]) -> Callable[..., Any]:
    text = "HOST:PORT of the head; without it RAY_ADDRESS, else the cluster on this machine."
    return click.option("--address", metavar="HOST:PORT", help=text)(command)


def _json(command: Callable[..., Any]) -> Callable[..., Any]:
    text = "Print JSON to stdout and nothing else; an error is the last line of stderr, as JSON."
    return click.option("--json", "as_json", is_flag=True, help=text)(command)


@contextmanager
def _cluster(address: str | None) -> Iterator[str]:
    from placement.runtime import client

    on_sigterm = signal.getsignal(signal.SIGTERM)
    with client.cluster(address) as found:
        # Connecting, Ray sets a handler of its own, which exits with 15 and says nothing.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)
        yield found


@contextmanager
def _service(address: str | None) -> Iterator[Any]:
    from placement.runtime import bootstrap

    with _cluster(address):
        yield bootstrap.connect()


def _ask(reference: Any) -> Any:
    from placement.runtime import client

    return client.ask(reference)


def _note(text: str) -> None:
    click.echo(text, err=True)


def _say(text: str) -> None:
    click.echo(text, file=streams.out())


def _dump(value: Any) -> None:
    _say(json.dumps(value, indent=2, allow_nan=False))


def _show(*renderables: Any) -> None:
    from placement.cli.render import console

    for renderable in renderables:
        console().print(renderable)


@click.group(cls=Commands, epilog=EPILOG)
@click.version_option(__version__, prog_name="placement")
def main() -> None:
    """Places deployments on exactly the right GPUs of a Ray cluster."""


@main.command(epilog="\b\nExample:\n  placement demo")
@_json
def demo(as_json: bool) -> None:
    """Places a mixed set of models on an embedded cluster of simulated nodes. Needs no GPU; takes about a minute."""
    from placement.cli.demo import run

    sys.exit(run(as_json))


@main.command(epilog="\b\nExample:\n  placement up --address 127.0.0.1:6379")
@_address
@click.option(
    "--near",
    metavar="LABELS",
    help="Node labels that make nodes near each other, widest first: zone,block,rack.",
)
@click.option(
    "--idle-seconds",
    metavar="SECONDS",
    type=click.FloatRange(min=1),
    help="A node that has held nothing for so long has its node actor ended, so that an autoscaler can remove it: "
    "60 unless told; inf keeps it, and the next placement there quick.",
)
@_json
def up(address: str | None, near: str | None, idle_seconds: float | None, as_json: bool) -> None:
    """Starts the service, or finds it running. It stays when this command ends.

    A service that runs is left as it is; if it is of another version, or has other settings than those given here,
    this is refused.
    """
    from placement.runtime import bootstrap

    if idle_seconds is not None and math.isnan(idle_seconds):
        raise click.UsageError("--idle-seconds: nan is no number of seconds; use at least 1, or inf")
    options: dict[str, Any] = {}
    if near:
        options["near"] = [label.strip() for label in near.split(",") if label.strip()]
    if idle_seconds is not None:
        options["idle_seconds"] = idle_seconds
    with _cluster(address) as found, _noted(KeyboardInterrupt, "`placement up` again finds what it started"):
        try:
            bootstrap.connect()
            said = "runs already"
        except errors.ServiceNotRunning:
            said = "is started"
            if not as_json:
                _note("starting the placement service ...")
        # Also where it was found: it may be restarting, and this waits until it answers.
        service = bootstrap.start(**options)
        _require_same(service, found, options)
        status = _ask(service.status.remote())
    if as_json:
        _dump(status)
        return
    nodes = status["nodes"]
    gpus = sum(node["gpu_count"] for node in nodes)
    with_gpus = sum(1 for node in nodes if node["gpu_count"])
    egress = sum(1 for node in nodes if node["egress"])
    there = f"{counted(gpus, 'GPU')} on {counted(with_gpus, 'node')}, {counted(egress, 'egress node')}"
    _say(f"the placement service {said}: {there}")
    for node in nodes:
        if node["problem"]:
            _note(f"note: {node['name']}: {node['problem']}")


def _require_same(service: Any, address: str, options: dict[str, Any]) -> None:
    """That what runs is what was asked for."""
    # First the version: another one may have no settings to tell.
    asked: dict[str, Any] = {"version": __version__}
    runs = {"version": _ask(service.ping.remote())}
    if asked == runs and options:
        asked, runs = options, _ask(service.settings.remote())

    differences = {
        name: (_setting(runs[name]), _setting(wanted))
        for name, wanted in asked.items()
        if runs[name] != wanted
    }
    if differences:
        raise errors.ServiceDiffers(address, differences)


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(value) or "(none)"
    return value if isinstance(value, str) else f"{value:g}"


@main.command(epilog="\b\nExample:\n  placement apply deployments.toml")
@click.argument("file", type=click.Path(path_type=Path))
@_address
@_json
def apply(file: Path, address: str | None, as_json: bool) -> None:
    """Makes what stands be as FILE (TOML or YAML) declares: all of it, or nothing is changed.

    Deployments that FILE does not name are left alone.
    """
    from placement.wire.files import load_deployments

    deployments = load_deployments(file)
    with _service(address) as service:
        if not as_json:
            _note(f"placing {counted(len(deployments), 'deployment')} ...")
        with _noted(KeyboardInterrupt, _GOES_ON):
            results = _ask(service.apply_all.remote(deployments))
        report = {"deployments": [result.to_dict() for result in results]}
    if as_json:
        _dump(report)
    else:
        from placement.cli.render import assignments_table

        _show(assignments_table(report["deployments"], title="placed"))


@main.command(
    epilog="\b\nExample:\n  placement plan deployments.toml\n"
    "  placement snapshot > cluster.json\n  placement plan --file cluster.json --explain deployments.toml"
)
@click.argument("deployments", metavar="FILE", type=click.Path(path_type=Path))
@click.option(
    "--file",
    "cluster",
    type=click.Path(path_type=Path),
    help="Plan for the cluster that `placement snapshot` wrote here. Needs no Ray and no cluster.",
)
@click.option("--explain", is_flag=True, help="Also say, stage by stage, what excluded how many nodes.")
@_address
@_json
def plan(deployments: Path, cluster: Path | None, explain: bool, address: str | None, as_json: bool) -> None:
    """Shows what applying FILE would do now. Reserves nothing."""
    from placement.wire.files import load_deployments

    if cluster is not None and address is not None:
        raise click.UsageError("--file and --address exclude each other; give one of them")
    wanted = load_deployments(deployments)
    if cluster is not None:
        from placement.wire.cluster import load_cluster
        from placement.wire.plans import explain_deployments, plan_deployments

        known = load_cluster(cluster)
        snapshot, held = known.snapshot(), known.held()
        explained = explain_deployments(snapshot, held, wanted) if explain else []
        plans = [] if explain else plan_deployments(snapshot, held, wanted)
    else:
        with _service(address) as service:
            explained = _ask(service.explain_all.remote(wanted)) if explain else []
            plans = [] if explain else _ask(service.plan_all.remote(wanted))

    refusal = explained[-1].error if explained else None
    plans = plans or [one.plan for one in explained if one.plan is not None]
    if as_json:
        listed = explained if explain else plans
        _dump({"deployments": [one.to_dict() for one in listed]})
    else:
        from placement.cli.render import assignments_table, explanation_view, runtimes_note

        for one in explained:
            _show(*explanation_view(one.to_dict()))
        if plans:
            rows = [one.to_dict() for one in plans]
            _show(assignments_table(rows, title="planned, nothing is reserved"), runtimes_note(rows))
    if refusal is not None:
        raise refusal


@main.command(epilog="\b\nExample:\n  placement snapshot > cluster.json")
@_address
@_json
def snapshot(address: str | None, as_json: bool) -> None:
    """Prints the cluster as the planner sees it, as JSON for `placement plan --file`. Holds no secret."""
    with _service(address) as service:
        _dump(_ask(service.snapshot.remote()))


@main.command(
    epilog="\b\nExample:\n  placement simulate examples/workloads/mix.toml --cluster dgx-h100=8,l40s-4x=16\n"
    "  placement simulate mix.toml --cluster cluster.json --policy topology --policy fragmentation --picture gpus.svg\n"
    "  placement simulate openb_pod_list_default.csv --cluster openb_node_list_gpu_node.csv --policy fragmentation"
)
@click.argument("workload", type=click.Path(path_type=Path))
@click.option(
    "--cluster",
    required=True,
    metavar="WHAT",
    help="A file of `placement snapshot` (.json), an openb node list (.csv), or machines of the catalogue by number "
    "(dgx-h100=4,l40s-4x=8), with 16 CPUs and 128 GiB beside each GPU.",
)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    type=click.Choice(POLICIES),
    help="Instead of each deployment's own. Give several to compare them.",
)
@click.option("--seed", default=0, show_default=True, help="Of a mix: the same seed, the same arrivals.")
@click.option("--arrivals", type=click.IntRange(min=1), help="Only so many.")
@click.option(
    "--picture", type=click.Path(path_type=Path), help="Draw the GPUs over time here: .svg or .png."
)
@_json
def simulate(
    workload: Path,
    cluster: str,
    policies: tuple[str, ...],
    seed: int,
    arrivals: int | None,
    picture: Path | None,
    as_json: bool,
) -> None:
    """Replays WORKLOAD on a cluster and shows what would become of it. Needs no Ray and reserves nothing.

    WORKLOAD is a mix (.toml, .yaml), a trace (.csv with arrive_seconds, depart_seconds and fields of a
    deployment), or a pod list of the openb trace (.csv). What fits nowhere when it arrives is refused and
    does not come back.
    """
    from placement.cli import simulate as simulation

    if picture is not None:
        simulation.check_picture(picture)
    reports = simulation.run(workload, cluster, policies, seed, arrivals, show=not as_json)
    if picture is not None:
        simulation.draw(reports, picture)
    if as_json:
        _dump({"simulations": [{"policy": name, **report.to_dict()} for name, report in reports.items()]})
        return
    from placement.cli.render import simulation_view

    _show(*simulation_view({name: report.to_dict() for name, report in reports.items()}))
    if picture is not None:
        _note(f"drawn: {picture}")


@main.command(epilog="\b\nExample:\n  placement status --json")
@_address
@_json
def status(address: str | None, as_json: bool) -> None:
    """Shows each node with its GPUs and who sits where, and each deployment."""
    with _service(address) as service:
        report = _ask(service.status.remote())
    if as_json:
        _dump(report)
    else:
        from placement.cli.render import status_view

        _show(*status_view(report))


@main.command(epilog="\b\nExample:\n  placement events llama-70b --follow")
@click.argument("name")
@click.option("--follow", is_flag=True, help="Go on until interrupted, and show what happens as it does.")
@_address
@_json
def events(name: str, follow: bool, address: str | None, as_json: bool) -> None:
    """Shows what happened to the replicas of a deployment: where they are, which were lost, why some are pending.

    With --follow, --json prints one object a line.
    """
    from placement.cli.render import event_line

    def show(one: dict[str, Any]) -> None:
        if as_json:
            _say(json.dumps(one, allow_nan=False))
        else:
            _show(event_line(one))

    with _service(address) as service:
        found = _ask(service.events.remote(name))
        if as_json and not follow:
            _dump({"deployment": name, "events": found})
            return
        while True:
            for one in found:
                show(one)
            if not follow:
                return
            since = found[-1]["number"] if found else 0
            found = []
            while not found:
                found = _ask(service.watch.remote(name, since))


@main.command(
    epilog="\b\nExample:\n  placement topology --node gpu-a\n  placement topology --name dgx-1v\n"
    "  nvidia-smi topo -m | placement topology --file -"
)
@click.option("--node", help="Only this node: its id, name or address.")
@click.option("--name", "name", help="A machine of the catalogue instead of a cluster's nodes.")
@click.option(
    "--file",
    "file",
    type=click.Path(path_type=Path, allow_dash=True),
    help="Output of `nvidia-smi topo -m` instead; - for stdin. Needs no cluster.",
)
@click.option("--gpu", metavar="NAME", help="With --file: the GPUs' product name, which the text lacks.")
@_address
@_json
def topology(
    node: str | None,
    name: str | None,
    file: Path | None,
    gpu: str | None,
    address: str | None,
    as_json: bool,
) -> None:
    """Shows how the GPUs of each node are linked, as NVML, the catalogue or a file says."""
    recorded = name is not None or file is not None
    if sum(choice is not None for choice in (node, name, file)) > 1:
        raise click.UsageError("--node, --name and --file exclude each other; give one of them")
    if recorded and address is not None:
        raise click.UsageError("--name and --file ask no cluster; leave out --address")
    if gpu is not None and file is None:
        raise click.UsageError("--gpu goes with --file; elsewhere the product name is known")
    from placement.cli.render import topology_view

    if recorded:
        reports = [_recorded(name, file, gpu)]
    else:
        with _service(address) as service:
            reports = _ask(service.topology.remote(node))
    if as_json:
        _dump({"nodes": reports})
        return
    for report in reports:
        _show(*topology_view(report))


def _recorded(name: str | None, file: Path | None, gpu: str | None) -> dict[str, Any]:
    """A machine of the catalogue or of a file, in the form that nodes are reported in."""
    from dataclasses import replace

    from placement import topologies
    from placement.core.matrix import read_matrix, render_matrix

    notes: tuple[str, ...] = ()
    if name is not None:
        shape = topologies.load(name)
    else:
        assert file is not None
        reading = read_matrix(_text(file))
        shape, notes = replace(reading.topology, model=gpu), reading.notes
    return {
        "name": name or ("stdin" if file == Path("-") else str(file)),
        "gpu_count": len(shape),
        "gpu_model": shape.model,
        "topology": name,
        "known": shape.known,
        "nvswitch": shape.nvswitch,
        "islands": [list(island) for island in shape.islands],
        "matrix": render_matrix(shape),
        "problem": "; ".join(notes) or None,
        "facts": topologies.facts(name).model_dump(mode="json") if name is not None else None,
    }


def _text(file: Path) -> str:
    from placement.wire.text import decoded, read_text

    return decoded(sys.stdin.buffer.read(), "-") if file == Path("-") else read_text(file)


@main.command(epilog="\b\nExample:\n  placement release llama-70b whisper")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@_address
@_json
def release(names: tuple[str, ...], address: str | None, as_json: bool) -> None:
    """Gives back all that deployments hold, and ends the workers in their placement groups.

    If one of the names is not known, nothing is released.
    """
    released: dict[str, int] = {}
    with _service(address) as service:
        report = _ask(service.status.remote())
        placed = [one["name"] for one in report["deployments"]]
        known = {*placed, *(one["name"] for one in report["unreadable"])}
        wanted = dict.fromkeys(names)
        if missing := [name for name in wanted if name not in known]:
            error = errors.UnknownDeployment(missing[0], tuple(placed))
            for name in missing[1:]:
                error.add_note(f"nor is {name!r}")
            error.add_note("nothing was released")
            raise error
        for name in wanted:
            before = f"released before: {', '.join(released)}" if released else "nothing was released"
            with (
                _noted(KeyboardInterrupt, f"the placement service goes on releasing {name}"),
                _noted(errors.PlacementError, before),
            ):
                released[name] = _ask(service.release.remote(name))
            if not as_json:
                _say(f"released {name}: {counted(released[name], 'replica')}")
    if as_json:
        _dump({"released": released})


@main.command(
    epilog="\b\nExample:\n  placement down\n  placement down --yes\n  placement down --keep-placements"
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option(
    "--keep-placements", is_flag=True, help="Leave everything placed; the next `placement up` finds it."
)
@_address
@_json
def down(yes: bool, keep_placements: bool, address: str | None, as_json: bool) -> None:
    """Releases everything and stops the service.

    Asks before it releases, since the workers of all deployments end. Where nobody can be asked, and with --json, say
    --yes.
    """
    from placement.runtime import bootstrap

    with _cluster(address) as found:
        asks = not yes and not keep_placements
        if asks and not _agreed(_ask(bootstrap.connect().status.remote()), found, as_json):
            _note("nothing is changed")
            sys.exit(REFUSED)
        with _noted(KeyboardInterrupt, "what was begun goes on; `placement down` again does the rest"):
            released = bootstrap.stop(keep_placements)
    if as_json:
        _dump({"released": released})
    else:
        what = f"; released {', '.join(released)}" if released else ""
        _say(f"the placement service is stopped{what}")


def _agreed(report: dict[str, Any], address: str, as_json: bool) -> bool:
    """Whether everything may be released; asked on a terminal."""
    placed = report["deployments"]
    replicas = sum(len({a["replica_index"] for a in one["assignments"]}) for one in placed)
    what = f"release {counted(len(placed), 'deployment')} with {counted(replicas, 'replica')}, ending their workers"
    where = f"and stop the placement service on the Ray cluster at {address}"
    if as_json or not sys.stdin.isatty():
        raise click.UsageError(
            f"this would {what}, {where}, and nobody can be asked; add --yes, or --keep-placements to leave them"
        )
    return click.confirm(f"{what.capitalize()}, {where}?", err=True)


if __name__ == "__main__":
    main()
