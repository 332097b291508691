"""A cluster as a picture, for a slide: each node with its GPUs, an outline for each NVLink island, the replicas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from placement.cli.views.console import replicas_text, shortened
from placement.cli.views.nodes import (
    MOST_NODES,
    cpus_told,
    died_text,
    gpu_heading,
    gpu_sets,
    idle_apart,
    idle_text,
)
from placement.cli.views.picture import CARD, CARD_FILL, GAP, MARGIN, NVLINK
from placement.cli.views.status import MOST_WAITING, not_placed, totals_text
from placement.cli.views.svg import PALE, Drawing, text_width
from placement.cli.views.tables import bandwidth_text

WIDTH = 1280
"""The width of a slide; a node with more GPUs than fit makes it wider."""
FILLS = (
    "#bcd8f2", "#ffd9b0", "#c3e6c1", "#f5c3c7", "#dccdf0", "#e3d2b8", "#bfe8ea", "#f0e08c", "#f2c9e4", "#d3dba6",
    "#c5cbe9", "#e8c7ae",
)  # fmt: skip
FREE, OTHER, ODD, LINE = "#ffffff", "#d9dde2", "#fff3d6", "#aab3bd"
CELL, SMALL_CELL = (74, 40), (17, 17)


def cluster_picture(report: Mapping[str, Any]) -> str:
    """A report of ``status`` as SVG; with many nodes GPUs are small, and a letter names the deployment on each."""
    return _Picture(report).svg()


class _Picture:
    def __init__(self, report: Mapping[str, Any]) -> None:
        self._report = report
        on_gpus = (one for one in report["deployments"] if any(a["gpus"] for a in one["assignments"]))
        names = sorted(one["name"] for one in on_gpus)
        self._fills = {name: FILLS[i % len(FILLS)] for i, name in enumerate(names)}
        shown = [
            node for node in report["nodes"] if node["gpu_count"] or node["egress"] or node["cpus"]["held"]
        ]
        self._nodes, self._idle = idle_apart(shown)
        self._small = len(self._nodes) > MOST_NODES
        self._page = Drawing()
        self._right = float(WIDTH)

    def svg(self) -> str:
        """All of it."""
        y = 52.0
        for line in totals_text(self._report).plain.splitlines():
            self._page.text(MARGIN, y, line, size=20 if y < 60 else 14, anchor="start", bold=y < 60)
            y += 26
        y = self._flow(y)
        for alike in self._idle.values():
            y = self._line(y, idle_text(alike, 150))
        y = self._waiting(self._legend(y + 14))
        return self._page.svg(self._right, y + MARGIN - GAP)

    def _flow(self, y: float) -> float:
        """The nodes beside each other, in as many rows as they need; returns where they end."""
        x, tall = float(MARGIN), 0.0
        for node in self._nodes:
            block, wide, high = self._node(node)
            if x > MARGIN and x + wide > WIDTH - MARGIN:
                x, y, tall = float(MARGIN), y + tall + GAP, 0.0
            self._page.place(block, y, x)
            self._right = max(self._right, x + wide + MARGIN)
            x, tall = x + wide + GAP, max(tall, high)
        return y + tall + 2 * GAP

    def _line(self, y: float, text: str) -> float:
        self._page.text(MARGIN, y + 12, shortened(text, 180), size=12, fill=PALE, anchor="start")
        return y + 20

    # -- a node -------------------------------------------------------------------------------------

    def _node(self, node: Mapping[str, Any]) -> tuple[Drawing, float, float]:
        block, size = Drawing(), 11 if self._small else 15
        name = shortened(node["name"], 20 if self._small else 40)
        block.text(0, size, name, size=size, anchor="start", bold=True)
        wide, y = text_width(name, size), size + 5.0
        if not self._small:
            told = died_text(node) or (
                gpu_heading(node) if node["gpu_count"] else "egress node" if node["egress"] else "CPU node"
            )
            told = shortened(told, 80)
            block.text(0, y + 10, told, size=11, fill=PALE, anchor="start")
            wide, y = max(wide, text_width(told, 11)), y + 18
        x = 0.0
        cell, pad, gap = (SMALL_CELL, 2, 1) if self._small else (CELL, 5, 4)
        for title, gpus in gpu_sets(node):
            across = len(gpus) * (cell[0] + gap) - gap + 2 * pad
            if x and x + across > WIDTH - 2 * MARGIN:
                x, y = 0.0, y + cell[1] + 2 * pad + gap + 2
            linked = not title and len(gpus) > 1 and node["topology_known"]
            block.rect(
                x, y, across, cell[1] + 2 * pad, "none", NVLINK if linked else LINE, 6, dashed=not linked
            )
            for i, gpu in enumerate(gpus):
                self._gpu(block, x + pad + i * (cell[0] + gap), y + pad, gpu, dead=bool(died_text(node)))
            wide, x = max(wide, x + across), x + across + gap + 2
        y += (cell[1] + 2 * pad + 6) * bool(x)
        for text in self._beside(node):
            size = 9 if self._small else 12
            block.text(0, y + size, shortened(text, 60), size=size, fill=PALE, anchor="start")
            wide, y = max(wide, text_width(shortened(text, 60), size)), y + size + 6
        return block, wide, y

    def _beside(self, node: Mapping[str, Any]) -> Iterator[str]:
        for one in node["egress"]:
            yield f"{one['resource']}: {one['held']} of {one['total']} requests"
        if node["cpus"]["held"]:
            yield cpus_told(node)
        if node["others_unlocated"] and self._small:  # else its heading says so
            yield f"{node['others_unlocated']} held by other Ray users, on ordinals not looked up yet"
        if node["problem"] and not died_text(node):
            yield node["problem"]

    def _gpu(self, block: Drawing, x: float, y: float, gpu: Mapping[str, Any], dead: bool) -> None:
        wide, high = SMALL_CELL if self._small else CELL
        who = gpu["occupants"]
        empty = (
            ODD
            if dead or gpu["state"] not in ("free", "held", "other")
            else OTHER
            if gpu["state"] == "other"
            else FREE
        )
        block.rect(x, y, wide, high, empty, CARD if empty == ODD else LINE, 3, dashed=empty != FREE)
        at = x
        for one in who:
            part = wide * one["share"]
            block.rect(at, y, part, high, self._fills.get(one["deployment"], OTHER), LINE, 3, dashed=dead)
            at += part
        if self._small:
            letter = who[0]["deployment"][:1].upper() if who else {FREE: "", OTHER: "-", ODD: "?"}[empty]
            if letter:
                block.text(x + wide / 2, y + high - 5, letter, size=10)
            return
        block.text(x + 5, y + 14, str(gpu["ordinal"]), size=11, anchor="start", bold=True)
        if not who:
            said = {"free": "free", "other": "other user"}.get(gpu["state"], "?")
            block.text(x + 5, y + 31, said, size=10, fill=PALE, anchor="start")
            return
        if len(who) > 1 or who[0]["share"] < 1:
            block.text(x + wide - 5, y + 14, f"{sum(one['share'] for one in who):.0%}", size=10, anchor="end")
        tail = f"/{who[0]['replica']}" if len(who) == 1 else f" +{len(who) - 1}"
        room = int((wide - 8) / text_width("0", 10))
        block.text(
            x + 5,
            y + 31,
            shortened(who[0]["deployment"], max(room - len(tail), 3)) + tail,
            size=10,
            anchor="start",
        )

    # -- below ---------------------------------------------------------------------------------------

    def _legend(self, y: float) -> float:
        """Each deployment with its colour, how many replicas are placed, and the slowest bandwidth among them."""
        column, size = (self._right - 2 * MARGIN) / 3, 12
        for i, one in enumerate(self._report["deployments"]):
            x = MARGIN + column * (i % 3)
            y += 20 * (i % 3 == 0 and i > 0)
            self._page.rect(x, y, 14, 14, self._fills.get(one["name"], FREE), LINE, 3)
            placed = len({a["replica_index"] for a in one["assignments"]})
            slow = min(
                (a for a in one["assignments"] if a["bandwidth_gb_per_s"]),
                key=lambda a: a["bandwidth_gb_per_s"],
                default=None,
            )
            rate = f", {bandwidth_text(slow['bandwidth_gb_per_s'], slow['weakest_link'])}" if slow else ""
            tail = f"  {placed}/{one['replicas']}{rate}"
            room = int((column - 24) / text_width("0", size)) - len(tail)
            self._page.text(
                x + 20, y + 12, shortened(one["name"], max(room, 8)) + tail, size=size, anchor="start"
            )
        y += 20 * bool(self._report["deployments"]) + 8
        x = float(MARGIN)
        for fill, text in (
            (FREE, "free"),
            (OTHER, "another Ray user (-)"),
            (ODD, "unknown or lost (?)"),
            ("", "NVLink island"),
        ):
            self._page.rect(
                x,
                y,
                14,
                14,
                fill or "none",
                NVLINK if not fill else CARD if fill == ODD else LINE,
                3,
                dashed=fill in (OTHER, ODD),
            )
            self._page.text(x + 20, y + 12, text, size=size, fill=PALE, anchor="start")
            x += 20 + text_width(text, size) + 18
        return y + 26

    def _waiting(self, y: float) -> float:
        waiting = [
            (one["name"], *each) for one in self._report["deployments"] for each in not_placed(one).items()
        ]
        for name, (state, reason), indices in waiting[:MOST_WAITING]:
            wide = self._right - 2 * MARGIN
            text = shortened(
                f"{name}, {replicas_text(indices)} {state}: {reason}", int((wide - 16) / text_width("0", 12))
            )
            self._page.rect(MARGIN, y, wide, 20, CARD_FILL, CARD, 4)
            self._page.text(MARGIN + 8, y + 14, text, size=12, anchor="start")
            y += 24
        return y
