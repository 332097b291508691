"""What goes on between the thread that reserves and the calls of a caller who creates the groups himself."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from placement.core.request import Strategy
from placement.runtime import groups, leases
from placement.runtime.leases import Lending, Loan
from placement.runtime.results import PlacementResult
from placement.wire.layout import BundleLayout


@pytest.fixture(autouse=True)
def every_group_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "group_from_hex", lambda group_id: group_id)


def test_one_group_after_the_other_until_there_is_a_result() -> None:
    async def scene() -> list[Any]:
        lending, result = Lending("a"), PlacementResult("a", [])
        outcome: Future[PlacementResult] = Future()
        lending.begin(outcome)
        got: list[Any] = []

        def reserve() -> None:
            got.extend(lending.create(name, [{"GPU": 1.0}], ["node"]) for name in ("g0", "g1", "g2"))
            outcome.set_result(result)

        first = asyncio.ensure_future(lending.step())
        await asyncio.sleep(0)
        with ThreadPoolExecutor() as pool:
            done = pool.submit(reserve)
            for number, answer in enumerate(("", "id0", "")):
                loan = await (lending.step(answer) if number else first)
                assert isinstance(loan, Loan)
                assert (loan.group_name, loan.id) == (f"g{number}", lending.id)
            assert await lending.step("id2") is result
            done.result()
        return got

    assert asyncio.run(scene()) == ["id0", None, "id2"]


def test_who_is_too_late_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEND_SECONDS", 0.01)
    lending = Lending("a")
    assert lending.create("g", [], []) is None
    assert lending.is_over
    assert lending.create("g", [], []) is None, "nothing more is offered to him"


def test_a_group_that_comes_at_the_last_moment_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    class JustInTime(Future[Any]):
        """Its answer comes when the time is over, but before anybody has acted on that."""

        def result(self, timeout: float | None = None) -> Any:
            if timeout is not None:
                self.set_result("id")
                raise TimeoutError
            return super().result()

    lending = Lending("a")
    monkeypatch.setattr(leases, "Future", JustInTime)
    assert lending.create("g", [], []) == "id"
    assert not lending.is_over


def test_how_bundles_are_spread_that_ray_is_to_place() -> None:
    bundles = ({"GPU": 1.0}, {"CPU": 1.0})
    labels: tuple[dict[str, str], ...] = ({}, {"zone": "a"})
    layout = BundleLayout(bundles=bundles, strategy=Strategy.SPREAD, bundle_label_selector=labels)

    async def loan(nodes: list[str]) -> Loan:
        lending = Lending("a", layout)
        lending.begin(Future())
        first = asyncio.ensure_future(lending.step())
        await asyncio.sleep(0)
        with ThreadPoolExecutor() as pool:
            done = pool.submit(lending.create, "g", [*bundles], nodes)
            got = await first
            lending.end()
            assert done.result() is None
        assert isinstance(got, Loan)
        return got

    theirs = asyncio.run(loan(["node", ""]))
    assert (theirs.strategy, theirs.labels, theirs.nodes) == ("SPREAD", labels, ["node", ""])
    assert asyncio.run(loan(["node", "node"])).strategy == "PACK", "where each has its node, that says it all"
