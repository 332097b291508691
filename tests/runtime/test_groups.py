"""Ray's GPU ids, and the slots that they mean."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import ray

from placement.runtime import groups
from placement.runtime.groups import NodeGroups
from placement.runtime.ray_internals import visible_devices


def slots(monkeypatch: pytest.MonkeyPatch, at_start: list[str] | None) -> Any:
    """What an id means where CUDA_VISIBLE_DEVICES was set so at ``ray start``, whatever it is in this process."""
    worker = ray._private.worker.global_worker
    monkeypatch.setattr(worker, "original_visible_accelerator_ids", {"GPU": at_start})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return NodeGroups("node", None)._slot


def test_an_id_is_the_slot_where_nothing_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert slots(monkeypatch, None)("3") == 3
    assert visible_devices() is None


@pytest.mark.parametrize(
    ("at_start", "ids"),
    [
        (["7", "5", "6"], ["7", "5", "6"]),
        (["GPU-b", "MIG-a"], ["GPU-b", "MIG-a"]),
        (["1", " 0"], ["1", " 0"]),  # Ray keeps the blank of "1, 0"
        (["1", "", "0"], ["1", "", "0"]),  # and counts what is empty
    ],
)
def test_an_id_is_a_token_by_its_place(
    monkeypatch: pytest.MonkeyPatch, at_start: list[str], ids: list[str]
) -> None:
    slot = slots(monkeypatch, at_start)
    assert [slot(gpu_id) for gpu_id in ids] == list(range(len(ids)))
    assert visible_devices() == ",".join(at_start)


def test_an_id_that_is_none_of_the_tokens_is_named_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"GPU '9' is not in CUDA_VISIBLE_DEVICES at `ray start`, which was '7,5'"
    ):
        slots(monkeypatch, ["7", "5"])("9")


def test_a_bundle_with_several_gpus_is_asked_once_for_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, float]] = []

    def ask(group: str, bundle: int, share: float) -> list[int]:
        asked.append((bundle, share))
        return {0: [3, 2], 2: [5]}[bundle]

    slots(monkeypatch, None)
    node = NodeGroups("node", None)
    monkeypatch.setattr(node, "_ask", ask)
    group: Any = "group"
    assert node.gpus_of(group, {0: 2, 2: 1}) == [2, 3, 5]
    assert node.gpus_of(group, {2: 0.25}) == [5]
    assert asked == [(0, 2), (2, 1), (2, 0.25)]


LATE, FAILED = ray.exceptions.GetTimeoutError(), ray.exceptions.WorkerCrashedError()


@pytest.mark.parametrize(
    ("answers", "gone", "found"),
    [
        ([["2"], LATE, ["3"]], [False], [2, 3]),
        ([["2"], LATE], [True], [2]),
        ([FAILED], [True], []),
    ],
    ids=["late", "waits for ever", "failed"],
)
def test_what_runs_in_a_group_that_is_gone_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, answers: list[Any], gone: list[bool], found: list[int]
) -> None:
    """Its creator was killed: Ray keeps the task waiting, or says that it failed. The other bundles are not asked."""

    class Probe:
        def options(self, **options: Any) -> Probe:
            return self

        def remote(self) -> str:
            return "task"

    def get(task: str, timeout: float) -> list[str]:
        if isinstance(answer := left.pop(0), Exception):
            raise answer
        return list(answer)

    left, asked = [*answers], iter(gone)
    cancelled: list[str] = []
    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "cancel", lambda task, force: cancelled.append(task))
    monkeypatch.setattr(groups, "is_gone", lambda group_id: next(asked))
    slots(monkeypatch, None)
    group: Any = SimpleNamespace(id=b"g")
    assert NodeGroups("node", Probe()).gpus_of(group, {0: 1, 1: 1}) == found
    assert (left, len(cancelled)) == ([], sum(gone))
