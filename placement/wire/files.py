"""Deployment files: TOML or YAML, many deployments in one, unknown fields refused."""

from __future__ import annotations

import difflib
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from placement.core.pasted import shortened
from placement.errors import InvalidDeployment
from placement.wire.deployment import Deployment
from placement.wire.groups import Group
from placement.wire.text import decoded, printable, read_text
from placement.wire.unknown import unknown_field

M = TypeVar("M", bound=BaseModel)

_ECHOED = {
    "name", "model", "runtime", "gpus", "replicas", "gpu_memory_gib", "mig", "min_bandwidth_gb_per_s", "within",
    "policy", "serving", "idempotent", "constraints", "budget",
}  # fmt: skip
"""Fields whose refused value may be shown. The other fields may hold a pasted key."""

_MOST_SAID = 400
"""The most characters of one problem: a number may have thousands of digits."""


def load_deployments(path: str | Path) -> list[Deployment]:
    """Reads a deployment file: ``[[deployments]]`` tables in TOML, a ``deployments:`` list in YAML.

    Raises:
        InvalidDeployment: the file cannot be read, is empty, or any deployment in it is refused. All
            problems are reported at once.
    """
    path = Path(path)
    return parse_deployments(read_text(path), suffix=path.suffix, source=str(path))


def load_all(paths: Iterable[str | Path], recursive: bool = False) -> list[Deployment]:
    """Reads several deployment files as if they were one.

    Args:
        paths: files; folders, of which each file that ends in .toml, .yaml or .yml is read, in the order of their
            names; ``-`` for standard input, TOML or YAML. A file that is named twice is read once.
        recursive: also folders in folders.

    Raises:
        InvalidDeployment: as :func:`load_deployments`, for all files at once; or two files use one name, a folder
            holds no such file, or there is nothing to read.
    """
    deployments: list[Deployment] = []
    refused: list[InvalidDeployment] = []
    used: dict[str, str] = {}
    for path in _files(paths, recursive, refused):
        try:
            found = _read_stdin() if path == _STDIN else load_deployments(path)
        except InvalidDeployment as error:
            refused.append(error)
            continue
        source = _source(path)
        twice = [one.name for one in found if one.name in used]
        if twice:
            problems = (f"name {name!r} is already used in {used[name]}; rename one" for name in twice)
            refused.append(InvalidDeployment(source, tuple(problems)))
        used.update({one.name: source for one in found if one.name not in used})
        deployments += found
    if len(refused) == 1:
        raise refused[0]
    if refused:
        each = tuple(f"{error.source}: {problem}" for error in refused for problem in error.problems)
        raise InvalidDeployment(f"{len(refused)} files", each)
    if not deployments:
        raise InvalidDeployment("no file", ("nothing is declared; name at least one file",))
    return deployments


_STDIN = Path("-")


def _source(path: Path) -> str:
    """The name of a file in errors."""
    return "standard input" if path == _STDIN else str(path)


def _files(paths: Iterable[str | Path], recursive: bool, refused: list[InvalidDeployment]) -> list[Path]:
    """The named files, each once; folders without any are added to ``refused``."""
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if path == _STDIN or not path.is_dir():
            found.setdefault(path if path == _STDIN else path.resolve(), path)
            continue
        try:
            inner = sorted(path.rglob("*") if recursive else path.iterdir())
        except OSError as error:
            refused.append(InvalidDeployment(str(path), (f"cannot be read: {error.strerror}",)))
            continue
        files = [one for one in inner if one.suffix.lower() in _ENDINGS and one.is_file()]
        if not files:
            further = "" if recursive else ", or add --recursive if they are in folders of it"
            problem = f"holds no file that ends in .toml, .yaml or .yml; name another folder{further}"
            refused.append(InvalidDeployment(str(path), (problem,)))
        for one in files:
            found.setdefault(one.resolve(), one)
    return list(found.values())


def _read_stdin() -> list[Deployment]:
    source = _source(_STDIN)
    text = decoded(sys.stdin.buffer.read(), source)
    return parse_deployments(text, ".toml" if _LIKE_TOML.search(text) else ".yaml", source)


_ENDINGS = (".toml", ".yaml", ".yml")
_LIKE_TOML = re.compile(r"^\s*(\[\[?\s*deployments?\b|deployments?\s*=)", re.MULTILINE)
"""How TOML names the deployments; no YAML file can have such a line at its top level."""


def load_model(model: type[M], path: Path) -> M:
    """Reads one model from a TOML or YAML file.

    Raises:
        InvalidDeployment: the file cannot be read, or is refused.
    """
    return parse_model(model, _parse(read_text(path), path.suffix.lower(), str(path)), str(path))


def parse_deployments(text: str, suffix: str, source: str) -> list[Deployment]:
    """Like :func:`load_deployments`, from text. ``suffix`` is ``.toml``, ``.yaml`` or ``.yml``."""
    content = _parse(text, suffix.lower(), source)
    example = "[[deployments]]" if suffix.lower() == ".toml" else "deployments:"
    if not content:
        raise InvalidDeployment(source, (f"is empty; add at least one deployment under {example}",))
    if not isinstance(content, Mapping):
        raise InvalidDeployment(source, (f"is not a mapping; put the deployments under {example}",))
    unknown = {key: _close(key) for key in content if key not in _TOP}
    problems = [_unknown_at_top(key, close, suffix) for key, close in unknown.items()]
    if "deployments" in unknown.values() and "deployments" not in content:
        raise InvalidDeployment(source, tuple(problems))
    entries = content.get("deployments")
    if isinstance(entries, Mapping) and entries:
        problems.append(f"deployments is a table; write {example} and a list of them, each with its name")
        raise InvalidDeployment(source, tuple(problems))
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        problems.append(f"has no deployments; add at least one under {example}")
        raise InvalidDeployment(source, tuple(problems))

    member_of = _groups(content.get("groups", []), entries, source, problems)
    deployments: list[Deployment] = []
    first_seen: dict[str, int] = {}
    for number, entry in enumerate(entries, start=1):
        name = entry.get("name") if isinstance(entry, Mapping) else None
        label = _label("deployment", number, name)
        try:
            if isinstance(name, str) and name in member_of and "group" not in entry:
                group = member_of[name]
                entry = {"replicas": group.replicas(name), **entry, "group": group}
            deployment = parse_model(Deployment, entry, source)
        except InvalidDeployment as error:
            problems += [f"{label}: {problem}" for problem in error.problems]
            continue
        if deployment.name in first_seen:
            first = first_seen[deployment.name]
            problems.append(
                f"{label}: name {deployment.name!r} is already used by deployment {first}; rename one"
            )
        first_seen.setdefault(deployment.name, number)
        deployments.append(deployment)
    if problems:
        raise InvalidDeployment(source, tuple(problems))
    return deployments


_TOP = ("deployments", "groups")
"""What a file holds."""


def _close(key: Any) -> str:
    """Which of these was probably meant; empty if none."""
    return next(iter(difflib.get_close_matches(str(key).lower(), _TOP, 1)), "")


def _unknown_at_top(key: Any, close: str, suffix: str) -> str:
    meant = f"[[{close}]]" if suffix.lower() == ".toml" else close
    hint = f"did you mean {meant}? The" if close else "the"
    return f"unknown field {shortened(repr(key))} at the top; {hint} file holds only deployments and groups"


def _groups(groups: Any, entries: Sequence[Any], source: str, problems: list[str]) -> dict[str, Group]:
    """Deployment -> the group that it is a member of. What is wrong with groups is added to ``problems``."""
    if not isinstance(groups, Sequence) or isinstance(groups, str):
        problems.append(
            "groups is no list; write [[groups]], or groups: and a list of them, each with its name"
        )
        return {}
    names = [entry.get("name") for entry in entries if isinstance(entry, Mapping)]
    found: dict[str, Group] = {}
    used: set[str] = set()
    for number, entry in enumerate(groups, start=1):
        label = _label("group", number, entry.get("name") if isinstance(entry, Mapping) else None)
        try:
            group = parse_model(Group, entry, source)
        except InvalidDeployment as error:
            problems += [f"{label}: {problem}" for problem in error.problems]
            continue
        if group.name in used or group.name in names:
            problems.append(f"{label}: name {group.name!r} is already used in this file; rename one")
        used.add(group.name)
        for member in group.members:
            if member not in names:
                known = ", ".join(str(name) for name in names if name) or "none"
                problems.append(
                    f"{label}: members: there is no deployment {member!r} in this file; it has {shortened(known, 200)}"
                )
            if member in found:
                problems.append(
                    f"{label}: members: {member!r} is a member of {found[member].name!r}, too; name it in one of them"
                )
            found.setdefault(member, group)
    return found


def _label(what: str, number: int, name: Any) -> str:
    """The name of an entry in errors: ``deployment 2 (llama)``."""
    return f"{what} {number}" + (f" ({shortened(name)})" if isinstance(name, str) and name else "")


def parse_model(model: type[M], value: Any, source: str) -> M:
    """Validates ``value`` as ``model``.

    Raises:
        InvalidDeployment: with a sentence for each problem; no secret in any of them.
    """
    if isinstance(value, model):
        # It may have been created without validation, by model_copy or model_construct.
        value = value.model_dump(exclude_unset=True, warnings=False)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems = error.errors()
        # For a list whose only entry is refused, pydantic also says that it is empty.
        inside = {problem["loc"][:-1] for problem in problems}
        lasting = [one for one in problems if one["type"] != "too_short" or one["loc"] not in inside]
        sentences = tuple(_sentence(model, dict(problem)) for problem in lasting)
        raise InvalidDeployment(source, sentences) from None


def _sentence(model: type[BaseModel], problem: dict[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    field = shortened(printable(".".join(location)), 200)
    message = str(problem["msg"]).removeprefix("Value error, ")
    kind = problem["type"]
    if kind == "missing":
        return f"{field}: is missing; add it"
    if kind == "extra_forbidden":
        message = unknown_field(location[-1], list(model.model_fields), {})
    if kind in ("extra_forbidden", "unknown_field"):
        return f"unknown field {field!r}; {message.removeprefix('unknown field; ')}"
    if kind != "value_error" and location and location[0] in _ECHOED:
        value = problem.get("input")
        if isinstance(value, str | int | float | bool) and len(str(value)) <= 80:
            message = f"{value!r} is refused: {message[:1].lower()}{message[1:]}"
    if len(message) > _MOST_SAID:
        message = f"{message[:_MOST_SAID]}..."
    return f"{field}: {message}" if field else message


def _parse(text: str, suffix: str, source: str) -> Any:
    if suffix == ".toml":
        content = _toml(text, source)
    elif suffix in (".yaml", ".yml"):
        content = _yaml(text, source)
    else:
        raise InvalidDeployment(source, (f"has the ending {suffix!r}; use .toml, .yaml or .yml",))
    check_depth(content, source)
    return content


def _toml(text: str, source: str) -> Any:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidDeployment(source, (f"is not valid TOML: {error}",)) from None
    except RecursionError:
        raise InvalidDeployment(source, (_TOO_DEEP,)) from None
    except ValueError:  # a number of more digits than Python reads
        raise InvalidDeployment(source, ("is not valid TOML: a number is too long",)) from None


def _yaml(text: str, source: str) -> Any:
    import yaml

    from placement.wire import bounded_yaml

    try:
        return bounded_yaml.load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be parsed"
        raise InvalidDeployment(source, (f"is not valid YAML: {what}{where}",)) from None


_MOST_DEPTH = 64
_TOO_DEEP = f"is nested more than {_MOST_DEPTH} deep; no field needs that"


def check_depth(content: Any, source: str) -> None:
    """Refuses values that are nested so deep that walking them would overflow the stack.

    Raises:
        InvalidDeployment: it is.
    """
    level = [content]
    for _ in range(_MOST_DEPTH):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return
    raise InvalidDeployment(source, (_TOO_DEEP,))
