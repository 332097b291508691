"""Changes the code in small ways and tells which changes no test notices: ``make mutants``.

mutmut makes the changes and runs, for each, the tests that reach the changed function. Here a random sample of them is
chosen, since all would take a night, and what survives is printed with its place. Everything is written to
``mutants/``, which git ignores.

In such a run this file is also a plugin of pytest: fast tests first, and few examples, the same each time.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MOST_EXAMPLES, MOST_RUNS = 25, 10
"""Of a property and of a state machine, in a run for one mutant."""

LOG = Path("mutants/log.txt")
"""What mutmut says while it runs."""

Places = Mapping[str, Path]
"""Mutant -> the file it is in."""


def mutants(files: Iterable[Path]) -> Places:
    """All that mutmut can make of these files."""
    from mutmut.mutation.file_mutation import mutate_file_contents
    from mutmut.utils.format_utils import get_mutant_name

    return {
        get_mutant_name(path, name): path
        for path in files
        for name in mutate_file_contents(str(path), path.read_text(encoding="utf-8")).mutant_names
    }


def fates(places: Places) -> dict[str, str]:
    """What became of each mutant."""
    from mutmut.mutation.data import SourceFileMutationData
    from mutmut.stats import status_by_exit_code

    codes: dict[str, Any] = {}
    for path in set(places.values()):
        data = SourceFileMutationData(path=path)
        data.load()
        codes |= data.exit_code_by_key
    return {name: status_by_exit_code[codes.get(name)] for name in places}


@dataclass(frozen=True)
class Change:
    """What a mutant is: where it begins, and the lines of a diff."""

    path: Path
    line: int
    rows: tuple[str, ...]

    @classmethod
    def of(cls, name: str, path: Path) -> Change:
        """A mutant that mutmut has made."""
        from mutmut.mutation.diff_apply import get_diff_for_mutant
        from mutmut.utils.format_utils import orig_function_and_class_names_from_key

        function, owner = orig_function_and_class_names_from_key(name)
        source = path.read_text(encoding="utf-8")
        start = source.index(f"\nclass {owner}") if owner else 0
        found = re.compile(rf"^[ ]*def {re.escape(function)}\b", re.MULTILINE).search(source, start)
        line, first = source.count("\n", 0, found.start()) if found else 0, 0
        rows = []
        for row in get_diff_for_mutant(name, path=path).splitlines()[2:]:
            if hunk := re.match(r"@@ -(\d+)", row):
                here = line + int(hunk[1])
                continue
            if row[0] in "-+":
                first = first or here
                rows.append(row)
            here += row[0] != "+"
        return cls(path, first, tuple(rows))

    @property
    def equivalent(self) -> bool:
        """Whether no test can tell: ``strict`` of a ``zip`` over what is equally long by construction."""
        old, new = (
            re.sub(
                r",\s*(strict=\w+)?\s*(?=\))",
                "",
                "".join(row[1:].strip() for row in self.rows if row[0] == sign),
            )
            for sign in "-+"
        )
        return old == new


def forget(places: Places) -> None:
    """Forgets what became of these in an earlier run, and the tests of then."""
    from mutmut.mutation.data import SourceFileMutationData

    shutil.rmtree(LOG.parent / "tests", ignore_errors=True)
    for path in set(places.values()):
        data = SourceFileMutationData(path=path)
        data.load()
        if data.exit_code_by_key:
            data.exit_code_by_key |= dict.fromkeys(data.exit_code_by_key.keys() & places.keys())
            data.save()


def run(names: list[str], minutes: float, jobs: int) -> None:
    """Has mutmut try these, until the time is up.

    Raises:
        RuntimeError: it did not even begin; with what it said.
    """
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("w", encoding="utf-8") as log:
        command = [str(Path(sys.executable).parent / "mutmut"), "run", "--max-children", str(jobs), *names]
        trying = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            trying.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            trying.send_signal(signal.SIGINT)
            trying.wait()
    if trying.returncode > 0:
        raise RuntimeError(f"mutmut failed; the end of {LOG}:\n{LOG.read_text(encoding='utf-8')[-4000:]}")


def main() -> int:
    """Tries a sample; the exit code says whether as many were killed as should be."""
    from mutmut.configuration import config
    from mutmut.utils.file_utils import walk_mutatable_files

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=300, help="how many to try")
    parser.add_argument("--seed", type=int, default=1, help="which ones")
    parser.add_argument("--minutes", type=float, default=60, help="when to stop")
    parser.add_argument("--jobs", type=int, default=1, help="how many to try at once")
    parser.add_argument("--least", type=float, default=0, help="percent that must be killed")
    parser.add_argument("files", nargs="*", type=Path, help="all that pyproject.toml names unless given")
    options = parser.parse_args()
    # A shell's background job ignores Ctrl-C, and so would mutmut, which is stopped by it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert config().source_paths, "see pyproject.toml"
    places = mutants(options.files or sorted(walk_mutatable_files()))
    tried = random.Random(options.seed).sample(sorted(places), min(options.sample, len(places)))
    sample = {name: places[name] for name in tried}
    forget(sample)
    run(tried, options.minutes, options.jobs)
    fate = fates(sample)
    for name in sorted(tried):
        if fate[name] not in ("killed", "timeout", "not checked"):
            change = Change.of(name, places[name])
            if change.equivalent:
                fate[name] = "equivalent"
                continue
            print(f"\n{change.path}:{change.line} {fate[name]}  {name}")
            print(*(f"    {row}" for row in change.rows), sep="\n")
    outcomes = Counter(fate.values())
    print(f"\n{len(tried)} of {len(places)} mutants, seed {options.seed}:", dict(outcomes))
    done = [name for name in tried if fate[name] not in ("equivalent", "not checked")]
    killed = [name for name in done if fate[name] in ("killed", "timeout")]
    each, dead = (Counter(str(places[name]) for name in names) for names in (done, killed))
    for path in sorted(each):
        print(f"{dead[path]:5} of {each[path]:4} killed  {path}")
    percent = 100 * len(killed) / max(1, len(done))
    print(f"{len(killed):5} of {len(done):4} killed: {percent:.1f} %")
    if outcomes["not checked"]:
        print(f"{outcomes['not checked']} were not tried, since the time was up: those that take longest")
    return int(percent < options.least)


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Fast tests first, and few examples, the same each time: what kills a mutant should do so soon, and again."""
    from hypothesis import Phase, settings

    def slow(item: Any) -> int:
        made = getattr(item.obj, "_hypothesis_internal_use_settings", None)
        if made is not None:
            item.obj._hypothesis_internal_use_settings = few(made, MOST_EXAMPLES)
            return 1
        case = getattr(item.cls, "settings", None)
        if isinstance(case, settings):
            item.cls.settings = few(case, MOST_RUNS)
            return 2
        return 0

    def few(made: settings, most: int) -> settings:
        return settings(
            made,
            max_examples=min(made.max_examples, most),
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
        )

    items.sort(key=slow)


if __name__ == "__main__":
    sys.exit(main())
