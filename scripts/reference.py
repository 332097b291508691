"""Writes the parts of the documentation that follow from the code: ``python -m scripts.reference``.

``docs/reference/deployment.md`` from the pydantic models, ``docs/reference/cli.md`` from click, and
``docs/states.svg`` from the table of a replica's states. They are committed, so that they can be read without
building anything; ``tests/test_docs.py`` compares them with the code.
"""

from __future__ import annotations

import inspect
import json
import re
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from html import escape
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from placement import (
    ApiKey,
    Budget,
    Deployment,
    Group,
    GroupLink,
    PlacementConstraints,
    RuntimeConfig,
    Serving,
)
from placement.cli.main import main
from placement.core.lifecycle import TRANSITIONS, State
from placement.wire.constraints import Spread

DOCS = Path(__file__).parents[1] / "docs"
GENERATED = "<!-- Written by `python -m scripts.reference`: change the code, not this file. -->\n"

MODELS: tuple[tuple[str, str, type[BaseModel]], ...] = (
    ("", "Deployment", Deployment),
    ("constraints.", "Constraints", PlacementConstraints),
    ("constraints.spread.", "Spread", Spread),
    ("runtime_config.", "Runtime configuration", RuntimeConfig),
    ("runtime_config.api_key.", "API key", ApiKey),
    ("serving.", "Serving", Serving),
    ("budget.", "Budget", Budget),
    ("groups.", "Group", Group),
    ("groups.links.", "Link of a group", GroupLink),
)
"""What begins the full names of a model's fields, its heading, the model."""
NOT_IN_FILES = ("placement_group", "group")
"""Fields that Python programs set, and no deployment file does."""
UNITS = (
    ("_gib", "GiB (2^30 bytes)"),
    ("_gib_per_gpu", "GiB (2^30 bytes)"),
    ("_gb_per_s", "GB/s (10^9 bytes a second)"),
    ("_seconds", "seconds"),
    ("usd_per_day", "US dollars a day"),
    ("tokens_per_minute", "tokens a minute"),
    ("requests_per_minute", "requests a minute"),
    ("gpus", "GPUs"),
    ("cpus", "CPUs"),
    ("cpus_per_gpu", "CPUs"),
    ("tensor_parallel", "GPUs"),
    ("pipeline_parallel", "groups"),
    ("replicas", "replicas"),
    ("max_concurrent", "requests"),
    ("units", "units"),
)
"""The end of a field's name, its unit."""


def pages() -> dict[str, str]:
    """Each file below docs/, with its text."""
    return {"reference/deployment.md": deployment(), "reference/cli.md": cli(), "states.svg": states()}


def fields() -> Iterator[tuple[str, str, FieldInfo]]:
    """The path of each field's model, the field's name, and the field, in the order of the reference."""
    for path, _, model in MODELS:
        for name, field in model.model_fields.items():
            if path or name not in NOT_IN_FILES:
                yield path, name, field


def deployment() -> str:
    """The fields of a deployment file."""
    text = [
        GENERATED,
        "# Fields of a deployment",
        "A deployment file is TOML or YAML: a list of `deployments`, and perhaps one of `groups`. "
        "[Declare what should run](../declare.md) explains how they are used together. The same names are the "
        "arguments of [`placement.Deployment`](python.md). An unknown field is refused, with the field that was "
        "probably meant.",
    ]
    for path, heading, model in MODELS:
        text.append(f"## {heading}")
        text.append(_summary(model))
        text += [_section(path, name, field) for at, name, field in fields() if at == path]
    return "\n\n".join(text) + "\n"


def _summary(model: type[BaseModel]) -> str:
    first = (inspect.getdoc(model) or "").partition("\n\nExample")[0]
    return re.sub(r":\w+:`~?([^`]*)`", r"`\1`", first.replace("``", "`"))


def _section(path: str, name: str, field: FieldInfo) -> str:
    """A field, with its type, default, unit and examples."""
    unit = next((unit for end, unit in reversed(UNITS) if name.endswith(end)), "")
    if name == "gpus" and path:
        unit = ""  # names of GPUs, not a number of them
    facts = {"Type": _type(field.annotation), "Default": _default(field), "Unit": unit}
    facts["Example"] = ", ".join(f"`{_toml(one)}`" for one in field.examples or ())
    listed = "\n".join(f"- {fact}: {text}" for fact, text in facts.items() if text)
    meaning = field.description or ""
    return f"### {path}{name}\n\n{meaning[:1].upper()}{meaning[1:]}.\n\n{listed}"


def _type(kind: Any) -> str:
    """A type, in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type(inner[0])
    if origin is Literal:
        return " or ".join(f"`{one}`" for one in inner)
    if origin in (Union, types.UnionType):
        kinds = [one for one in inner if one is not type(None)]
        return "number" if set(kinds) == {int, float} else " or ".join(dict.fromkeys(map(_type, kinds)))
    if origin is tuple:
        return (
            f"list of {_type(inner[0])}" if inner[-1] is ... else f"list of {len(inner)}: {_type(inner[0])}"
        )
    if origin is dict or kind is dict:
        return f"table of {_type(inner[1])}" if inner else "table"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " or ".join(f"`{one.value}`" for one in kind)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        of = next((heading for _, heading, model in MODELS if model is kind), kind.__name__)
        return f"[table](#{of.lower().replace(' ', '-')})"
    return {str: "text", int: "whole number", float: "number", bool: "true or false"}.get(kind, "any value")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        return "as below"
    return "none" if default is None or default in ((), {}) else f"`{_toml(default)}`"


def _toml(value: Any) -> str:
    """A value as TOML has it."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {_toml(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value.value if isinstance(value, Enum) else value)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def cli() -> str:
    """The commands, with what their ``--help`` says."""
    text = [
        GENERATED,
        "# Command line",
        "`placement COMMAND --help` shows the same. With `--json` a command prints JSON, also of an error "
        "([errors](../errors.md)).",
        *_command("placement", main),
    ]
    return "\n\n".join(text) + "\n"


def _command(name: str, command: click.Command) -> Iterator[str]:
    """One command and those below it, each with its usage, its options and its examples."""
    arguments = [
        one.make_metavar(click.Context(command)) for one in command.params if isinstance(one, click.Argument)
    ]
    inner = command.commands if isinstance(command, click.Group) else {}
    words = [name, "[OPTIONS]", *arguments, *(["COMMAND ..."] if inner else [])]
    yield f"## {name}"
    yield inspect.cleandoc(command.help or "").replace("\b\n", "")
    yield f"```text\n{' '.join(words)}\n```"
    options = [_option(one) for one in command.params if isinstance(one, click.Option)]
    if options:
        yield "\n".join(["| option | meaning |", "| --- | --- |", *options])
    for part in (command.epilog or "").split("\b\n")[1:]:
        heading, _, lines = part.partition("\n")
        yield heading
        yield f"```text\n{inspect.cleandoc(lines)}\n```"
    for word, one in inner.items():
        yield from _command(f"{name} {word}", one)


def _option(one: click.Option) -> str:
    kind = one.metavar or (
        "|".join(one.type.choices) if isinstance(one.type, click.Choice) else one.type.name.upper()
    )
    value = "" if one.is_flag else f" {kind}"
    names = ", ".join([*one.opts, *one.secondary_opts])
    default = one.default if isinstance(one.default, str | int | float) and not one.is_flag else None
    shown = f" Default: `{default}`." if one.show_default and default is not None else ""
    text = f"`{names}{value}`", f"{one.help or ''}{shown}"
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in text) + " |"


PLACES = {
    None: (70, 280), State.RESERVING: (270, 50), State.PENDING: (270, 165), State.PLACED: (445, 50),
    State.DEGRADED: (620, 50), State.LOST: (445, 165), State.RELEASING: (620, 280),
}  # fmt: skip
"""Where each state is drawn."""


def states() -> str:
    """The states of a replica, and what leads from one to another."""
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 320" font-family="sans-serif" font-size="13" '
        'role="img" aria-label="States of a replica">',
        "<title>States of a replica</title>",
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        'orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="#666"/></marker></defs>',
        '<rect width="700" height="320" rx="6" fill="#fff"/>',
    ]
    for (source, event), target in TRANSITIONS.items():
        lines += _arrow(source, event.value, target)
    for state, (x, y) in PLACES.items():
        name = state.value if state else "no replica"
        lines.append(
            f'<rect x="{x - 48}" y="{y - 16}" width="96" height="32" rx="8" fill="#eef2fb" stroke="#3f51b5"/>'
            f'<text x="{x}" y="{y + 5}" text-anchor="middle" fill="#1a237e">{escape(name)}</text>'
        )
    return "\n".join([*lines, "</svg>"]) + "\n"


def _arrow(source: State | None, event: str, target: State | None) -> Iterator[str]:
    """An arrow from the edge of one state to that of another; those that go both ways lie beside each other."""
    (x1, y1), (x2, y2) = PLACES[source], PLACES[target]
    length = ((x2 - x1) ** 2 + (y2 - y1) ** 2) ** 0.5
    dx, dy = (x2 - x1) / length, (y2 - y1) / length
    both_ways = any(one == target and after == source for (one, _), after in TRANSITIONS.items())
    aside = 8.0 if both_ways else 0.0
    x1, y1, x2, y2 = x1 - dy * aside, y1 + dx * aside, x2 - dy * aside, y2 + dx * aside
    reach = min(50 / abs(dx) if dx else 1e9, 18 / abs(dy) if dy else 1e9)
    ax, ay, bx, by = x1 + dx * reach, y1 + dy * reach, x2 - dx * reach, y2 - dy * reach
    text_aside = 8 + 20 * abs(dy)  # a text is wider than it is high
    x, y = (ax + bx) / 2 - dy * text_aside, (ay + by) / 2 + dx * text_aside + 4
    yield (
        f'<path d="M{ax:.0f} {ay:.0f}L{bx:.0f} {by:.0f}" stroke="#666" fill="none" marker-end="url(#head)"/>'
        f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="middle" fill="#444" font-size="11">{escape(event)}</text>'
    )


if __name__ == "__main__":
    for path, page in pages().items():
        (DOCS / path).parent.mkdir(exist_ok=True)
        (DOCS / path).write_text(page)
