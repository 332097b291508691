"""A machine as a picture: GPUs with their NVLinks above, and their PCIe tree below.

PCIe is drawn as the tree that follows from the paths between the GPUs (:meth:`Topology.pcie_path`): switches, host
bridges, NUMA nodes, and on each the network cards at that distance. Unknown parts are not drawn; a text says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any

from placement.cli.views.console import few, shortened
from placement.cli.views.machine import host_texts, lanes_text, shape_in
from placement.cli.views.pcie_tree import Gpu, Place, gpus_of, pcie_tree, slices_of
from placement.cli.views.svg import INK, PALE, Drawing, text_width
from placement.core.topology import Path, ordinals

NVLINK, PCIE, SWITCH, HOST, CARD = "#3f7d00", "#4a6fa5", "#e4ecf7", "#f6f1e7", "#b86e00"
GPU_FILL, CARD_FILL, HOST_INK = "#edf6df", "#fdf1df", "#8a7145"
MARGIN, GAP, GROUP_GAP = 28, 12, 26
GPU_WIDTH, SLICE_WIDTH, CARD_WIDTH, CARD_HEIGHT = 88, 22, 92, 22
MOST_CARDS = 6
"""How many network cards of one place are drawn; if there are more, the last one says how many."""


def picture(reports: Sequence[Mapping[str, Any]]) -> str:
    """Machines below each other, as SVG; those that look the same are drawn once, with all their names.

    Args:
        reports: as ``placement topology --json`` has them under ``nodes``.
    """
    alike: dict[str, tuple[_Machine, list[str]]] = {}
    for report in reports:
        machine = _Machine(report)
        alike.setdefault(machine.drawing.svg(machine.width, machine.height), (machine, []))[1].append(
            report["name"]
        )
    page, y, width = Drawing(), 0.0, 0.0
    for machine, names in alike.values():
        heading = Drawing()
        name = shortened(few(names, 4), 80)
        heading.text(MARGIN, 44, name, size=22, anchor="start", bold=True)
        page.place(heading, y)
        page.place(machine.drawing, y)
        y += machine.height
        width = max(width, machine.width, text_width(name, 22) + 2 * MARGIN)
    return page.svg(width or 2 * MARGIN, y or 2 * MARGIN)


class _Machine:
    """One machine, below the place where its name goes."""

    def __init__(self, report: Mapping[str, Any]) -> None:
        self.shape = shape_in(report)
        self.drawing = Drawing()
        self._gpus = gpus_of(self.shape, report["facts"] or {})
        self._numa, self._far = pcie_tree(self.shape, self._gpus)
        self._middle: dict[int, float] = {}
        self._box: dict[int, tuple[float, float]] = {}
        right = self._columns()
        self.width = max(right + MARGIN, 640)
        y = self._said(66)
        y = self._links_above(y)
        y = self._cards_and_gpus(y)
        y = self._pcie_below(y)
        self.height = self._legend(y + 22) + 14

    # -- where it goes ------------------------------------------------------------------------------

    def _columns(self) -> float:
        """Places everything from left to right; returns where that ends."""
        x = float(MARGIN)
        for numa in self._numa:
            numa.left = x
            x += GAP
            for bridge in numa.inner:
                bridge.left = x
                for switch in bridge.inner:
                    switch.left = x
                    for gpu in switch.inner:
                        for slot in gpu.slots:
                            self._middle[slot] = x + _width(gpu) / 2
                            self._box[slot] = x, _width(gpu)
                        x += _width(gpu) + GAP
                    x = self._card_columns(switch, x)
                    switch.right = x - GAP
                x = self._card_columns(bridge, x)
                bridge.right = x - GAP
            x = self._card_columns(numa, x)
            numa.right = x
            x += GROUP_GAP
        far = Place([], Path.SYS, self._far)
        return self._card_columns(far, x) - GAP if self._far else x - GROUP_GAP

    def _card_columns(self, place: Place, x: float) -> float:
        return x + (CARD_WIDTH + GAP) * -(-min(len(place.cards), MOST_CARDS) // 3)

    # -- drawing ------------------------------------------------------------------------------------

    def _said(self, y: float) -> float:
        shape, count = self.shape, len(self._gpus)
        said = [f"{count} x {shape.model}" if shape.model else f"{count} GPU{'s' * (count != 1)}"]
        said += host_texts(shape, [gpu.slots[0] for gpu in self._gpus if not gpu.profiles] or [0])
        line = ""
        for part in said:
            longer = f"{line}  ·  {part}" if line else part
            if line and text_width(longer, 13) > self.width - 2 * MARGIN:
                self.drawing.text(MARGIN, y, line, size=13, fill=PALE, anchor="start")
                y, longer = y + 19, part
            line = longer
        self.drawing.text(MARGIN, y, line, size=13, fill=PALE, anchor="start")
        return y + 18

    def _links_above(self, y: float) -> float:
        shape = self.shape
        linked = {
            (a, b): shape.link(a, b).nvlinks
            for a, b in combinations(range(len(shape)), 2)
            if shape.link(a, b).nvlinks
        }
        if not linked:
            return y + 10
        ends = sorted({slot for pair in linked for slot in pair}, key=self._middle.__getitem__)
        if shape.nvswitch:
            left, right = self._middle[ends[0]] - 40, self._middle[ends[-1]] + 40
            self.drawing.rect(left, y + 8, right - left, 34, NVLINK, radius=6)
            self.drawing.text((left + right) / 2, y + 30, "NVSwitch", size=15, fill="#ffffff", bold=True)
            for slot in ends:
                links = max(
                    linked.get((min(slot, other), max(slot, other)), 0) for other in ends if other != slot
                )
                x = self._middle[slot]
                self.drawing.line(x, y + 42, x, y + 82, NVLINK, _thickness(links))
                self.drawing.text(
                    x + 9, y + 67, f"NV{links}", size=11, fill=NVLINK, anchor="start", bold=True
                )
            return y + 82
        order = {slot: i for i, slot in enumerate(sorted(self._middle, key=self._middle.__getitem__))}
        height = {pair: 12 + 24 * abs(order[pair[0]] - order[pair[1]]) for pair in linked}
        bottom = y + 14 + max(height.values())
        ports = self._ports(linked, order)
        labels = []
        for (a, b), links in sorted(linked.items(), key=lambda one: -height[one[0]]):
            x1, x2 = sorted((ports[a, b], ports[b, a]))
            self.drawing.arc(x1, x2, bottom, height[a, b], NVLINK, _thickness(links))
            labels.append(((x1 + x2) / 2, bottom - height[a, b], f"NV{links}"))
        for x, top, label in labels:
            wide = text_width(label, 11)
            self.drawing.rect(x - wide / 2 - 3, top - 8, wide + 6, 16, "#ffffff", radius=3)
            self.drawing.text(x, top + 4, label, size=11, fill=NVLINK, bold=True)
        return bottom

    def _ports(
        self, linked: Iterable[tuple[int, int]], order: Mapping[int, int]
    ) -> dict[tuple[int, int], float]:
        """Where on GPU ``a`` the link to ``b`` begins, so that inner arcs do not cross outer ones."""
        ends: dict[int, list[int]] = {}
        for a, b in linked:
            ends.setdefault(a, []).append(b)
            ends.setdefault(b, []).append(a)
        ports = {}
        for slot, others in ends.items():
            here = order[slot]
            others.sort(
                key=lambda other: (
                    order[other] > here,
                    here - order[other] if order[other] < here else -order[other],
                )
            )
            step = min(12.0, (GPU_WIDTH - 20) / len(others))
            for i, other in enumerate(others):
                ports[slot, other] = self._middle[slot] + (i - (len(others) - 1) / 2) * step
        return ports

    def _cards_and_gpus(self, y: float) -> float:
        height = 118 if any(gpu.profiles for gpu in self._gpus) else 70
        for numa in self._numa:
            for bridge in numa.inner:
                for switch in bridge.inner:
                    for gpu in switch.inner:
                        self._gpu(gpu, y, height)
        return y + height

    def _gpu(self, gpu: Gpu, y: float, height: float) -> None:
        x, width = self._box[gpu.slots[0]]
        draw, lanes = self.drawing, self.shape.lanes[gpu.slots[0]]
        draw.rect(x, y, width, height, GPU_FILL, NVLINK, radius=7)
        if not gpu.profiles:
            draw.text(
                x + width / 2, y + height / 2 + (0 if lanes else 6), f"GPU {gpu.slots[0]}", size=16, bold=True
            )
            if lanes:
                draw.text(x + width / 2, y + height / 2 + 18, lanes_text(lanes), size=11, fill=PALE)
            return
        slots = f"slot {gpu.slots[0]}" if len(gpu.slots) == 1 else f"slots {ordinals(gpu.slots)}"
        draw.text(x + width / 2, y + 18, f"MIG, {slots}", size=13, bold=True)
        at, step = x + 6, (width - 12) / gpu.slices
        for slot, profile in zip(gpu.slots, gpu.profiles, strict=True):
            wide = step * slices_of(profile)
            draw.rect(at + 1, y + 26, wide - 2, height - 34, "#ffffff", NVLINK, radius=3)
            draw.text(at + wide / 2, y + 40, str(slot), size=11, bold=True)
            draw.text(
                at + wide / 2 + 4, y + height - 14, profile, size=10, fill=PALE, anchor="start", upward=True
            )
            at += wide

    def _pcie_below(self, y: float) -> float:
        draw = self.drawing
        switched = [
            switch
            for numa in self._numa
            for bridge in numa.inner
            for switch in bridge.inner
            if len(switch.inner) > 1 or switch.cards
        ]
        below = y + 34
        host = below + 30 + 30 if switched else y + 44
        for numa in self._numa:
            for bridge in numa.inner:
                for switch in bridge.inner:
                    has_switch = switch in switched
                    for gpu in switch.inner:
                        x = self._middle[gpu.slots[0]]
                        end = below if has_switch else host
                        self._lane(x, y, end if numa.told else host + 8, gpu, dashed=not numa.told)
                    self._cards(switch, y, below)
                    if has_switch:
                        self._switch(switch, below)
                        middle = (switch.left + switch.right) / 2
                        draw.line(middle, below + 30, middle, host, PCIE, 4)
                self._cards(bridge, y, host)
                if numa.told:
                    draw.rect(bridge.left, host, bridge.right - bridge.left, 8, HOST_INK, radius=2)
            for column in self._cards(numa, y, host):
                draw.rect(column - 20, host, 40, 8, HOST_INK, radius=2)
        if self._far:
            left = self._numa[-1].right + GROUP_GAP
            right = self._card_columns(Place([], Path.SYS, self._far), left) - GAP
            self._cards(Place([], Path.SYS, self._far, right=right), y, y)
            draw.text((left + right) / 2, y + 18, "near no GPU", size=11, fill=PALE)
        for numa, after in zip(self._numa, [*self._numa[1:], None], strict=True):
            self._host(numa, host + 8)
            if after is not None:
                draw.line(numa.right, host + 36, after.left, host + 36, HOST_INK, 4)
        return host + 8 + 56

    def _lane(self, x: float, y: float, end: float, gpu: Gpu, dashed: bool) -> None:
        lanes = self.shape.lanes[gpu.slots[0]]
        self.drawing.line(x, y, x, end, PCIE, 4 if lanes is None else max(1.5, lanes.width / 4), dashed)

    def _switch(self, switch: Place, y: float) -> None:
        width = switch.right - switch.left
        name = "PCIe switch" if width > 100 else "switch"
        self.drawing.rect(switch.left, y, width, 30, SWITCH, PCIE, radius=5)
        self.drawing.text(switch.left + width / 2, y + 20, name, size=12, fill=PCIE, bold=True)

    def _host(self, numa: Place, y: float) -> None:
        slots, width = numa.slots(), numa.right - numa.left
        shape, middle = self.shape, (numa.left + numa.right) / 2
        nodes, cpus = shape.numa[slots[0]], shape.cpus[slots[0]]
        known = (
            nodes
            or len(slots) == 1
            or any(shape.pcie_path(a, b) is not Path.UNKNOWN for a, b in combinations(slots, 2))
        )
        self.drawing.rect(numa.left, y, width, 48, HOST, HOST_INK, radius=6, dashed=not known)
        name = f"NUMA node{'s' * (len(nodes) > 1)} {ordinals(nodes)}" if nodes else "NUMA node"
        lines = [(name if known else "PCIe not known", 14.0, INK)]
        lines += [(f"CPUs {ordinals(cpus)}", 11.0, PALE)] * bool(cpus)
        for (text, size, fill), below in zip(lines, (21, 38) if cpus else (30,), strict=True):
            size = max(8, min(size, size * (width - 8) / text_width(text, size)))
            text = shortened(text, int((width - 8) / text_width("0", size)))
            self.drawing.text(middle, y + below, text, size=size, fill=fill, bold=size > 11)

    def _cards(self, place: Place, y: float, end: float) -> list[float]:
        """The network cards at the right end of a place, and the lines down to ``end``; the middles of the columns."""
        names = place.cards
        if len(names) > MOST_CARDS:
            names = [*names[: MOST_CARDS - 1], f"+ {len(names) - MOST_CARDS + 1} more"]
        columns = [names[i : i + 3] for i in range(0, len(names), 3)]
        middles = []
        right = place.right - (GAP if place.level is Path.NODE else 0)
        for i, column in enumerate(columns):
            x = right - CARD_WIDTH - (len(columns) - 1 - i) * (CARD_WIDTH + GAP)
            top = y - 70 + (70 - len(column) * (CARD_HEIGHT + 2)) / 2
            for j, name in enumerate(column):
                box = top + j * (CARD_HEIGHT + 2)
                self.drawing.rect(x, box, CARD_WIDTH, CARD_HEIGHT, CARD_FILL, CARD, radius=4)
                self.drawing.text(x + CARD_WIDTH / 2, box + 15, shortened(name, 12), size=11, fill=INK)
            middles.append(x + CARD_WIDTH / 2)
            if end > y:
                bottom = top + len(column) * (CARD_HEIGHT + 2) - 2
                self.drawing.line(middles[-1], bottom, middles[-1], end, CARD, 2)
        return middles

    def _legend(self, y: float) -> float:
        shape, draw = self.shape, self.drawing
        places = [
            place
            for numa in self._numa
            for place in (numa, *numa.inner, *(s for b in numa.inner for s in b.inner))
        ]
        items: list[tuple[str, str]] = []
        if any(link.nvlinks for row in shape.links for link in row):
            items.append(("nvlink", "NVLink, NVn: n links"))
        if all(numa.told for numa in self._numa):
            items.append(("pcie", "PCIe"))
        else:
            items.append(("dashed", "PCIe, not known in detail"))
        if any(place.level is Path.PXB and (len(place.inner) > 1 or place.cards) for place in places):
            items.append(("switch", "PCIe switch"))
        if any(numa.told or numa.cards for numa in self._numa):
            items.append(("bridge", "PCIe host bridge"))
        if shape.nics:
            items.append(("card", "network card"))
        if len(self._numa) > 1:
            items.append(("sockets", "between NUMA nodes (SYS)"))
        x = float(MARGIN)
        for kind, text in items:
            wide = 34 + text_width(text, 12) + 18
            if x > MARGIN and x + wide > self.width - MARGIN + 18:
                x, y = float(MARGIN), y + 22
            if kind in ("nvlink", "pcie", "dashed", "sockets"):
                colour = {"nvlink": NVLINK, "sockets": HOST_INK}.get(kind, PCIE)
                draw.line(x, y + 8, x + 26, y + 8, colour, 4, dashed=kind == "dashed")
            elif kind in ("switch", "card"):
                fill, stroke = {"switch": (SWITCH, PCIE), "card": (CARD_FILL, CARD)}[kind]
                draw.rect(x, y, 26, 16, fill, stroke, radius=4)
            elif kind == "bridge":
                draw.rect(x, y + 4, 26, 8, HOST_INK, radius=2)
            draw.text(x + 34, y + 12, text, size=12, fill=PALE, anchor="start")
            x += wide
        return y + 22


def _width(gpu: Gpu) -> float:
    return max(GPU_WIDTH, gpu.slices * SLICE_WIDTH + 12) if gpu.profiles else GPU_WIDTH


def _thickness(links: int) -> float:
    return min(1.6 + 0.8 * links, 7)
