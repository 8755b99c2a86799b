"""A picture of recall by depth, length and task, one panel per arm. matplotlib is imported when one is drawn."""

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path

from .suite import Result

DEPTH_BINS = 10

Grid = list[list[float]]
"""[depth bins][columns] mean scores; NaN where nothing was asked."""


def can_draw() -> bool:
    """Whether matplotlib is installed (the extra `quality` brings it)."""
    return importlib.util.find_spec("matplotlib") is not None


def columns(results: Sequence[Result], tasks: Sequence[str]) -> list[tuple[str, int]]:
    """(task, length) of every column, by task, then length; only results that have a depth count."""
    present = {(r.task, r.length) for r in results if r.depth is not None}
    return sorted(
        (cell for cell in present if cell[0] in tasks), key=lambda cell: (list(tasks).index(cell[0]), cell[1])
    )


def grid(results: Sequence[Result], arm: str, wanted: Sequence[tuple[str, int]]) -> Grid:
    """Mean scores of one arm by depth and column."""
    sums = [[0.0] * len(wanted) for _ in range(DEPTH_BINS)]
    counts = [[0] * len(wanted) for _ in range(DEPTH_BINS)]
    for r in results:
        if r.arm == arm and r.depth is not None and (r.task, r.length) in wanted:
            row = min(int(r.depth * DEPTH_BINS), DEPTH_BINS - 1)
            column = wanted.index((r.task, r.length))
            sums[row][column] += r.score
            counts[row][column] += 1
    return [
        [total / count if count else math.nan for total, count in zip(*rows, strict=True)]
        for rows in zip(sums, counts, strict=True)
    ]


def draw(path: Path, results: Sequence[Result], arms: Sequence[str], tasks: Sequence[str], title: str) -> bool:
    """Writes the picture. False, and no file, when no result has a depth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    wanted = columns(results, tasks)
    if not wanted:
        return False
    one_length = len({length for _, length in wanted}) == 1
    labels = [task if one_length else f"{task}, {length:,}" for task, length in wanted]
    width = max(2.4, 0.62 * len(wanted))
    figure, panels = pyplot.subplots(
        1, len(arms), figsize=(width * len(arms) + 2.2, 5.2), sharey=True, squeeze=False, layout="constrained"
    )
    for arm, panel in zip(arms, panels[0], strict=True):
        values = grid(results, arm, wanted)
        image = panel.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                if not math.isnan(value):
                    colour = "black" if value > 0.5 else "white"
                    panel.text(column, row, f"{value * 100:.0f}", ha="center", va="center", fontsize=8, color=colour)
        for column in range(1, len(wanted)):
            if wanted[column][0] != wanted[column - 1][0]:
                panel.axvline(column - 0.5, color="white", linewidth=3)
        panel.set_xticks(range(len(wanted)), labels, rotation=45, ha="right", rotation_mode="anchor")
        panel.set_title(arm)
    step = 100 // DEPTH_BINS
    panels[0][0].set_yticks(range(DEPTH_BINS), [f"{i * step} to {i * step + step} %" for i in range(DEPTH_BINS)])
    panels[0][0].set_ylabel("where in the document the fact stands")
    figure.colorbar(image, ax=list(panels[0]), label="found", format=lambda share, _: f"{share:.0%}", shrink=0.8)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
