"""Colour-blind-safe colours: viridis for amounts, Okabe and Ito's for classes (https://jfly.uni-koeln.de/color/)."""

from dataclasses import dataclass

VIRIDIS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")
ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7",
)  # fmt: skip
EMPTY = "var(--st-secondary-background-color)"
INK = "var(--st-text-color)"


@dataclass(frozen=True)
class Class:
    """A named class of heads: its colours and a mark for those who do not see the colour."""

    name: str
    bg: str
    fg: str
    mark: str


STATUS = {
    None: Class("not begun", EMPTY, INK, "·"),
    "draft": Class("draft", YELLOW, "#222", "◐"),
    "done": Class("done", BLUE, "#fff", "●"),
}
SEMANTICITY = {
    "monosemantic": Class("monosemantic", BLUE, "#fff", "1"),
    "nearly_monosemantic": Class("nearly monosemantic", SKY, "#222", "1+"),
    "bisemantic": Class("bisemantic", ORANGE, "#222", "2"),
    "polysemantic": Class("polysemantic", PURPLE, "#222", "n"),
    "unclear": Class("unclear", "#999999", "#111", "?"),
    None: Class("not judged", EMPTY, INK, "·"),
}


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def viridis(share: float) -> str:
    """The colour at a share of the scale, clipped to [0, 1].

    >>> viridis(0), viridis(1), viridis(0.5)
    ('#440154', '#fde725', '#21918c')
    """
    place = min(1.0, max(0.0, share)) * (len(VIRIDIS) - 1)
    low = min(int(place), len(VIRIDIS) - 2)
    part = place - low
    pairs = zip(_channels(VIRIDIS[low]), _channels(VIRIDIS[low + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * part):02x}" for a, b in pairs)


def ink_on(colour: str) -> str:
    """Black or white, whichever has the higher contrast on a colour (WCAG relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in
              (channel / 255 for channel in _channels(colour))]  # fmt: skip
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000" if luminance > 0.179 else "#fff"
