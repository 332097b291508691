"""What ``placement.placement_group()`` takes beside Ray's own call, in one run: ``python -m benchmarks.drop_in``.

Each round makes two groups of four GPUs on one node with sixteen, one right after the other, and removes both: the
first 0.3 s after the removal of what was there before, the second beside it. All kinds of groups in turn, so that all
see the same noise. Ray's own is reserved then, on whatever GPUs; ours is verified from inside as well.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import ray
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.placement_group import placement_group as rays_own

import placement
from placement.runtime.embedded import SimulatedNode, embedded_cluster

PAUSE_SECONDS = 0.3
KINDS: dict[str, Callable[[], PlacementGroup]] = {
    "Ray's own, 4 bundles of one GPU": lambda: rays_own([{"GPU": 1}] * 4),
    "ours, 4 bundles of one GPU": lambda: placement.placement_group([{"GPU": 1}] * 4),
    "ours, one bundle of 4 GPUs": lambda: placement.placement_group([{"GPU": 4}]),
    "ours, 2 GPUs and 4 halves": lambda: placement.placement_group([{"GPU": 2}, *[{"GPU": 0.5}] * 4]),
}


def timed(create: Callable[[], PlacementGroup]) -> tuple[PlacementGroup, float]:
    """A group, and after how many milliseconds it was ready."""
    start = time.perf_counter()
    group = create()
    assert group.wait(30)
    return group, (time.perf_counter() - start) * 1000


def main() -> None:
    """Runs all kinds in turn and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds

    took: dict[str, list[tuple[float, float]]] = {name: [] for name in KINDS}
    with embedded_cluster(
        [SimulatedNode("dgx-2", topology="dgx-2")],
        progress=lambda name: print(f"starting {name}", flush=True),
    ):
        placement.start()
        for _ in range(rounds + 3):
            for name, create in KINDS.items():
                time.sleep(PAUSE_SECONDS)
                (first, after_a_pause), (second, at_once) = timed(create), timed(create)
                took[name].append((after_a_pause, at_once))
                remove_placement_group(first)
                remove_placement_group(second)

    print(f"\n4 GPUs of one node, {rounds} rounds in turn, {os.cpu_count()} cores, ray {ray.__version__}")
    print(f"{'':34} {'0.3 s after a removal':>24} {'right after another':>24}")
    base = [statistics.median(values) for values in zip(*next(iter(took.values()))[3:], strict=True)]
    for name, pairs in took.items():
        medians = [statistics.median(values) for values in zip(*pairs[3:], strict=True)]
        cells = (f"{value:13.1f} ms {value / of:6.1f} x" for value, of in zip(medians, base, strict=True))
        print(f"{name:34} {' '.join(cells)}")


if __name__ == "__main__":
    main()
