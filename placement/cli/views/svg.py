"""Drawings as SVG text, by hand: the same input gives the same bytes, and nothing need be installed."""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

INK, PALE = "#1f2933", "#66727f"
FONT = "Helvetica, Arial, 'DejaVu Sans', sans-serif"


class Drawing:
    """What is drawn so far. Lengths are pixels, from the upper left corner; later things cover earlier ones."""

    def __init__(self) -> None:
        self._parts: list[str] = []

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        stroke: str = "none",
        radius: float = 0,
        dashed: bool = False,
    ) -> None:
        """A box."""
        self._add(
            "rect", x=x, y=y, width=width, height=height, rx=radius, fill=fill, stroke=stroke, dashed=dashed
        )

    def line(
        self, x1: float, y1: float, x2: float, y2: float, stroke: str, width: float = 1, dashed: bool = False
    ) -> None:
        """A straight line."""
        self._add("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=stroke, stroke_width=width, dashed=dashed)

    def arc(self, x1: float, x2: float, y: float, height: float, stroke: str, width: float) -> None:
        """A line from ``x1`` to ``x2``, both at ``y``, in an arc above."""
        top = y - height * 4 / 3  # a curve reaches three quarters of the way to where it is pulled
        d = f"M {_n(x1)} {_n(y)} C {_n(x1)} {_n(top)}, {_n(x2)} {_n(top)}, {_n(x2)} {_n(y)}"
        self._add("path", d=d, fill="none", stroke=stroke, stroke_width=width)

    def circle(self, x: float, y: float, radius: float, fill: str, stroke: str = "none") -> None:
        """A dot."""
        self._add("circle", cx=x, cy=y, r=radius, fill=fill, stroke=stroke)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 12,
        fill: str = INK,
        anchor: str = "middle",
        bold: bool = False,
        upward: bool = False,
    ) -> None:
        """A line of text; ``y`` is its baseline."""
        attributes = _attributes(
            x=x,
            y=y,
            font_size=size,
            fill=fill,
            text_anchor=anchor,
            font_weight="bold" if bold else None,
            transform=f"rotate(-90 {_n(x)} {_n(y)})" if upward else None,
        )
        self._parts.append(f"<text{attributes}>{escape(_clean(text))}</text>")

    def svg(self, width: float, height: float) -> str:
        """All of it, on white."""
        size = _attributes(
            width=width, height=height, viewBox=f"0 0 {_n(width)} {_n(height)}", font_family=FONT
        )
        head = f'<svg xmlns="http://www.w3.org/2000/svg"{size}>'
        return "\n".join(
            [head, '<rect width="100%" height="100%" fill="#ffffff"/>', *self._parts, "</svg>", ""]
        )

    def place(self, other: Drawing, y: float, x: float = 0) -> None:
        """Another drawing, further down and to the right."""
        self._parts += [f'<g transform="translate({_n(x)} {_n(y)})">', *other._parts, "</g>"]

    def _add(self, tag: str, dashed: bool = False, **attributes: object) -> None:
        self._parts.append(f"<{tag}{_attributes(**attributes, stroke_dasharray='5 4' if dashed else None)}/>")


def text_width(text: str, size: float) -> float:
    """The greatest width of a text in any font of the list."""
    return 0.62 * size * len(text)


def _attributes(**values: object) -> str:
    pairs = ((name if name == "viewBox" else name.replace("_", "-"), value) for name, value in values.items())
    return "".join(
        f" {name}={quoteattr(_n(value) if isinstance(value, int | float) else _clean(str(value)))}"
        for name, value in pairs
        if (value is not None and value != "none") or name == "fill"
    )


def _n(value: float) -> str:
    return f"{round(value, 1):g}" if value < 1e5 else str(round(value))


def _clean(text: str) -> str:
    """The text without characters that XML does not allow."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
