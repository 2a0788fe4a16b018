"""A run as a picture: like steps in one box, boxes in layers, lines between those that need each other.

Steps of one kind at one depth are one box with counts by state, so a plan of a thousand shards is as easy
to read as one of three. The layout is Sugiyama's in its simplest form: layers by the longest way from a
source, lines over several layers led through places of their own, order within a layer by the mean place of
what a box needs (barycentre). Nothing but HTML: boxes are text, lines are one image behind them.
"""

import html
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from app.colours import BLUE, GREEN, PURPLE, RED, SKY, YELLOW
from atlas.db.rows import StepRow

MARKS = {
    "pending": "○", "ready": "◌", "running": "◐", "done": "●", "skipped": "◎", "failed": "✕",
    "cancelled": "–",
}  # fmt: skip
COLOURS = {
    "pending": "rgba(128,128,128,.35)", "ready": SKY, "running": YELLOW, "done": BLUE, "skipped": GREEN,
    "failed": RED, "cancelled": PURPLE,
}  # fmt: skip
WORDS = {"skipped": "was current"}
"""What a state is called where its own name says too little."""
ORDER = ("done", "skipped", "running", "ready", "pending", "failed", "cancelled")
BOX_W, BOX_H, GAP_X, GAP_Y, LANE_H, SWEEPS = 126, 52, 38, 14, 14, 4
LINE = "#8a8a8a"


@dataclass
class Box:
    """Steps of one kind at one depth, or (without steps) a place that a long line goes through."""

    key: str
    layer: int
    steps: list[StepRow] = field(default_factory=list)
    x: float = 0.0
    y: float = 0.0

    @property
    def height(self) -> int:
        """Of the box, or of the lane."""
        return BOX_H if self.steps else LANE_H

    @property
    def title(self) -> str:
        """The step's name, or the kind with its number."""
        return self.steps[0].name if len(self.steps) == 1 else f"{self.steps[0].kind} × {len(self.steps)}"

    @property
    def states(self) -> list[tuple[str, int]]:
        """How many steps are in which state, in one order."""
        count = Counter(step.status for step in self.steps)
        return [(state, count[state]) for state in ORDER if count[state]]


@dataclass(frozen=True)
class Picture:
    """Boxes and the lines between them, with their places in pixels."""

    boxes: tuple[Box, ...]
    lines: tuple[tuple[Box, ...], ...]
    width: float
    height: float


def depths(steps: Sequence[StepRow]) -> dict[str, int]:
    """The longest way to each step from one that needs nothing; steps come after what they need."""
    found: dict[str, int] = {}
    for step in steps:
        found[step.name] = 1 + max((found[need] for need in step.needs if need in found), default=-1)
    return found


def grouped(steps: Sequence[StepRow]) -> tuple[dict[str, Box], dict[str, set[str]]]:
    """Boxes by key, and the boxes that each of them needs, without ways that lead through another."""
    depth = depths(steps)
    boxes: dict[str, Box] = {}
    home: dict[str, str] = {}
    for step in steps:
        key = f"{step.kind}@{depth[step.name]}"
        boxes.setdefault(key, Box(key, depth[step.name])).steps.append(step)
        home[step.name] = key
    needs: dict[str, set[str]] = {key: set() for key in boxes}
    for step in steps:
        needs[home[step.name]] |= {home[need] for need in step.needs if need in home}
    return boxes, _reduced(needs)


def _reduced(needs: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The transitive reduction of an acyclic graph whose keys come after what they need."""
    above: dict[str, set[str]] = {}
    for key, direct in sorted(needs.items(), key=lambda pair: int(pair[0].rpartition("@")[2])):
        above[key] = direct.union(*(above[need] for need in direct))
    return {
        key: {n for n in direct if not any(n in above[o] for o in direct)} for key, direct in needs.items()
    }


def layout(steps: Sequence[StepRow]) -> Picture:
    """Where everything stands; the same steps always give the same picture."""
    boxes, needs = grouped(steps)
    layers: list[list[Box]] = [[] for _ in range(1 + max((box.layer for box in boxes.values()), default=-1))]
    for box in boxes.values():
        layers[box.layer].append(box)
    before: dict[str, list[Box]] = {}
    lines = []
    for key, box in boxes.items():
        for need in sorted(needs[key]):
            line = _led(boxes[need], box, layers)
            lines.append(line)
            for one, other in pairwise(line):
                before.setdefault(other.key, []).append(one)
    _order(layers, before)
    height = max((sum(b.height + GAP_Y for b in layer) for layer in layers), default=0)
    for number, layer in enumerate(layers):
        y = (height - sum(b.height + GAP_Y for b in layer)) / 2
        for box in layer:
            box.x, box.y = number * (BOX_W + GAP_X), y + GAP_Y / 2
            y += box.height + GAP_Y
    width = len(layers) * (BOX_W + GAP_X) - GAP_X if layers else 0
    return Picture(tuple(boxes.values()), tuple(lines), width, height)


def _led(start: Box, end: Box, layers: list[list[Box]]) -> tuple[Box, ...]:
    """A line with a place in each layer between; a box's long lines share their places."""
    way = [start]
    for layer in range(start.layer + 1, end.layer):
        key = f"lane {start.key} {layer}"
        lane = next((box for box in layers[layer] if box.key == key), None)
        if lane is None:
            lane = Box(key, layer)
            layers[layer].append(lane)
        way.append(lane)
    return (*way, end)


def _order(layers: list[list[Box]], before: Mapping[str, list[Box]]) -> None:
    """Sort each layer by the mean place of what its boxes come from; ties keep the plan's order."""
    after: dict[str, list[Box]] = {}
    for layer in layers:
        for box in layer:
            for one in before.get(box.key, []):
                after.setdefault(one.key, []).append(box)
    for sweep in range(SWEEPS):
        near = before if sweep % 2 == 0 else after
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            place = {b.key: i / max(len(row) - 1, 1) for row in layers for i, b in enumerate(row)}

            def mean(
                box: Box, near: Mapping[str, list[Box]] = near, at: Mapping[str, float] = place
            ) -> float:
                found = [at[one.key] for one in near.get(box.key, [])]
                return sum(found) / len(found) if found else at[box.key]

            layer.sort(key=mean)


def _path(line: Sequence[Box]) -> str:
    """An SVG path through the places of a line, leaving boxes on the right and coming in on the left."""
    out = ""
    for one, other in pairwise(line):
        x0, y0 = one.x + BOX_W, one.y + one.height / 2
        x1, y1 = other.x, other.y + other.height / 2
        start = f"M{one.x + (0 if not one.steps else BOX_W):.0f} {y0:.1f} L{x0:.0f} {y0:.1f}"
        bend = (x1 - x0) / 2
        out += f"{start} C{x0 + bend:.0f} {y0:.1f} {x1 - bend:.0f} {y1:.1f} {x1:.0f} {y1:.1f} "
    return out.strip()


def _lines_image(picture: Picture) -> str:
    paths = "".join(f"<path d='{_path(line)}'/>" for line in picture.lines)
    size = f"width='{picture.width:.0f}' height='{picture.height:.0f}'"
    svg = (
        f"<svg xmlns='http://www.w3.org/2000/svg' {size}><g fill='none' stroke='{LINE}' stroke-width='1.3'>"
        f"{paths}</g></svg>"
    )
    return f"data:image/svg+xml;base64,{b64encode(svg.encode()).decode()}"


def _box(box: Box) -> str:
    total = len(box.steps)
    parts = "".join(
        f'<i style="width:{100 * count / total:.1f}%;background:{COLOURS[state]}"></i>'
        for state, count in box.states
    )
    said = " ".join(f"{MARKS[state]}{count if total > 1 else ''}" for state, count in box.states)
    words = ", ".join(f"{count} {WORDS.get(state, state)}" for state, count in box.states)
    title = html.escape(box.title)
    failed = " ha-dag-failed" if any(state == "failed" for state, _ in box.states) else ""
    return (
        f'<div class="ha-dag-box{failed}" style="left:{box.x:.0f}px;top:{box.y:.0f}px;width:{BOX_W}px;'
        f'height:{BOX_H}px" title="{title}: {words}"><b>{title}</b><span>{said}</span>'
        f'<div class="ha-progress">{parts}</div></div>'
    )


def dag_html(steps: Sequence[StepRow]) -> str:
    """The picture with its legend, as HTML; everything that comes from a plan is escaped."""
    picture = layout(steps)
    boxes = "".join(_box(box) for box in picture.boxes)
    shown = [state for state in ORDER if any(step.status == state for step in steps)]
    legend = "".join(
        f'<span><i style="background:{COLOURS[state]}"></i>{MARKS[state]} {WORDS.get(state, state)}</span>'
        for state in shown
    )
    size = f"width:{picture.width:.0f}px;height:{picture.height:.0f}px"
    return (
        f'<div class="ha-scroll" role="img" aria-label="Steps and what they need; the table says the same">'
        f'<div class="ha-dag" style="{size}"><img alt="" src="{_lines_image(picture)}">{boxes}</div></div>'
        f'<div class="ha-dag-keys">{legend}</div>'
    )
