"""Whose end ends a deployment."""

from __future__ import annotations

from typing import Any

import pytest

from placement.errors import InvalidDeployment
from placement.runtime import owners
from placement.runtime.declarations import parse
from placement.runtime.owners import _Jobs, asker_of, owner_of


@pytest.mark.parametrize(
    ("declared", "caller", "owner"),
    [
        ("detached", {"job": "01"}, None),
        ("detached", {"job": "01", "owner_actor": "aa"}, {"kind": "actor", "actor": "aa"}),
        ("job", {"job": "01", "actor": "bb", "pid": "7"}, {"kind": "job", "job": "01"}),
        ("job", {"job": "01", "submission": "s"}, {"kind": "job", "job": "01", "submission": "s"}),
        ("caller", {"job": "01", "pid": "7", "submission": "s"}, {"kind": "caller", "job": "01"}),
        ("caller", {"job": "01", "actor": "bb"}, {"kind": "caller", "job": "01", "actor": "bb"}),
    ],
)
def test_who_asks_says_whose_it_is(declared: str, caller: dict[str, str], owner: Any) -> None:
    assert owner_of(parse({"name": "a", "model": "m", "owner": declared}, None), caller) == owner


def test_a_job_that_nobody_names_cannot_own_anything() -> None:
    with pytest.raises(InvalidDeployment, match="needs the caller's job"):
        owner_of(parse({"name": "a", "model": "m", "owner": "job"}, None), None)


def test_of_a_caller_who_does_not_say_who_he_is_it_is_not_known_that_he_has_ended() -> None:
    assert not owners.has_ended(asker_of(None))


def test_ray_is_asked_for_its_jobs_once_for_all_that_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(owners.time, "monotonic", lambda: now[0])
    rows: list[dict[str, object]] = [{"JobID": "01", "IsDead": False}, {"JobID": "02", "IsDead": True}]
    reads = []

    def read() -> list[dict[str, object]]:
        reads.append(now[0])
        return list(rows)

    jobs = _Jobs(read)
    for _ in range(1000):
        assert jobs.running() == {"01"}
    rows[0]["IsDead"] = True
    now[0] += owners.JOBS_SECONDS + 0.01
    assert jobs.running() == frozenset()
    assert len(reads) == 2
