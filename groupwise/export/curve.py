"""A metric by step, and its picture as SVG."""

from __future__ import annotations

import html
from dataclasses import dataclass

WIDTH, HEIGHT, MARGIN = 640, 240, 40  # pixels
WINDOW = 10  # steps in the mean of an end, or fewer in a short run


@dataclass(frozen=True, slots=True)
class Curve:
    """Values of one metric, in the order of their steps."""

    metric: str
    steps: tuple[int, ...]
    values: tuple[float, ...]

    def ends(self) -> tuple[float, float]:
        """The mean of the first and of the last steps: at most ten, at most a third of them."""
        count = max(1, min(WINDOW, len(self.values) // 3))
        return sum(self.values[:count]) / count, sum(self.values[-count:]) / count


def curve_svg(curve: Curve) -> str:
    """A line with its lowest and highest value and its first and last step written at the axes."""
    low, high = min(curve.values), max(curve.values)
    spread, span = (high - low) or 1.0, (curve.steps[-1] - curve.steps[0]) or 1
    points = " ".join(
        f"{MARGIN + (step - curve.steps[0]) / span * (WIDTH - 2 * MARGIN):.1f},"
        f"{HEIGHT - MARGIN - (value - low) / spread * (HEIGHT - 2 * MARGIN):.1f}"
        for step, value in zip(curve.steps, curve.values, strict=True)
    )
    right, bottom = WIDTH - MARGIN, HEIGHT - MARGIN
    texts = (
        (4, MARGIN + 4, f"{high:.3g}"),
        (4, bottom + 4, f"{low:.3g}"),
        (MARGIN, HEIGHT - 12, f"step {curve.steps[0]}"),
        (right - 60, HEIGHT - 12, f"step {curve.steps[-1]}"),
        (MARGIN, 20, curve.metric),
    )
    labels = "".join(f'<text x="{x}" y="{y}">{html.escape(text)}</text>' for x, y, text in texts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>'
        f'<path d="M{MARGIN} {MARGIN}V{bottom}H{right}" fill="none" stroke="#999"/>'
        f'<polyline points="{points}" fill="none" stroke="#2a6fbb" stroke-width="2"/>{labels}</svg>\n'
    )
