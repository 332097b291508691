"""The mix of what is asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from placement.core.mix import Kind, Mix
from placement.core.needs import Needs
from placement.core.request import Request


def test_the_mix_counts_sets_and_what_they_take_besides() -> None:
    request = Request(
        "d", (0, 1), Needs(4), stages=3, parts=2, cpu_milli=500, memory_bytes=7,
        labels={"b": "2", "a": "1"}, accelerators=("H100",), compute_capability=(9, 0), gpu_nodes=("n",),
    )  # fmt: skip
    kind = Kind(Needs(4), ("H100",), (9, 0), (("a", "1"), ("b", "2")), ("n",))
    once = Mix().plus(request)
    assert once.kinds == {kind: (12, 6000, 84)}
    twice = once.plus(Request("e", (0,), Needs(4))).plus(replace(request, deployment="other", replicas=(5,)))
    assert twice.kinds == {kind: (18, 9000, 126), Kind(Needs(4)): (1, 0, 0)}
    assert once.kinds == {kind: (12, 6000, 84)}, "the old one stays as it was"


@pytest.mark.parametrize("request_", [Request("d", (0,), provider="openai"), Request("d", (0,), Needs(0))])
def test_what_takes_no_gpus_is_not_in_the_mix(request_: Request) -> None:
    mix = Mix()
    assert mix.plus(request_) is mix
    assert mix.kinds == {}
