"""What a replica needs of a node's GPUs."""

from __future__ import annotations

import pytest

from placement.core.needs import GIB, WHOLE, Needs, Within


@pytest.mark.parametrize(
    ("needs", "size", "expected"),
    [
        (Needs(1), None, WHOLE),
        (Needs(1, share=250), None, 250),
        (Needs(1, share=250), 80 * GIB, 250),
        (Needs(1, memory_bytes=20 * GIB), 80 * GIB, 250),
        (Needs(1, memory_bytes=20 * GIB + 1), 80 * GIB, 251),  # as much as is asked, never less
        (Needs(1, memory_bytes=80 * GIB), 80 * GIB, WHOLE),
        (Needs(1, memory_bytes=80 * GIB + 1), 80 * GIB, None),
        (Needs(1, memory_bytes=1), None, None),
        (Needs(1, memory_bytes=1), 0, None),
    ],
)
def test_memory_is_a_share_of_the_gpu_it_is_on(needs: Needs, size: int | None, expected: int | None) -> None:
    assert needs.share_of(size) == expected


def test_the_least_share_is_that_of_the_largest_gpu() -> None:
    needs = Needs(1, memory_bytes=20 * GIB)
    assert needs.least_share([40 * GIB, None, 80 * GIB, 16 * GIB]) == 250
    assert needs.least_share([16 * GIB, None]) == WHOLE
    assert needs.least_share([]) == WHOLE


@pytest.mark.parametrize(
    ("needs", "slowest", "floor", "whole"),
    [
        (Needs(2), 0, False, True),
        (Needs(2, min_bandwidth_gb_per_s=19.92), -19_920, True, True),
        (Needs(1, min_bandwidth_gb_per_s=19.92), 0, False, True),  # there is no link to be slow
        (Needs(2, Within.NVLINK), 0, True, True),
        (Needs(1, share=500), 0, False, False),
        (Needs(1, memory_bytes=1), 0, False, False),
        (Needs(1, profile="1g.10gb"), 0, False, False),
    ],
)
def test_what_is_a_floor_and_what_a_whole_gpu(needs: Needs, slowest: int, floor: bool, whole: bool) -> None:
    assert (needs.slowest, needs.floor, needs.whole) == (slowest, floor, whole)
