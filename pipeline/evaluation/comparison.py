"""Runs compared: relative differences of their figures, paired over seeds, with intervals."""

import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from models.files import write_text
from pipeline.inference.model_card import read_scalars

CONFIDENCE = 0.95
LEVEL = "x0_error_at_log_snr_"
LOGGED = {"speed/images_per_s": "images_per_s", "memory/peak_gib": "peak_gib"}

Figures = dict[str, float]


class Interval(NamedTuple):
    """A difference relative to the base's mean, 0.01 being 1% more, and the bounds of its interval."""

    change: float
    low: float
    high: float

    @property
    def found(self) -> bool:
        """Whether the interval holds no 0."""
        return self.low > 0 or self.high < 0


def read_figures(run: Path, measurements: Path) -> Figures:
    """All that was measured of a run, the geometric mean of its errors, and medians of speed and memory."""
    parts = [part["figures"] for part in json.loads(measurements.read_text())]
    figures = {name: value for part in parts for name, value in part.items()}
    errors = [value for name, value in figures.items() if name.startswith(LEVEL)]
    figures["x0_error"] = float(np.exp(np.mean(np.log(errors))))
    logged = read_scalars(run, *LOGGED).items()
    return figures | {LOGGED[tag]: float(np.median(values)) for tag, (_, values) in logged}


@lru_cache
def t_quantile(probability: float, dof: int) -> float:
    """Quantile of Student's t: where t = sqrt(dof) tan(a), the density of a is as cos(a)^(dof - 1)."""
    edges = np.linspace(-np.pi / 2, np.pi / 2, 1_000_001)
    share = np.cumsum(np.cos((edges[1:] + edges[:-1]) / 2) ** (dof - 1))
    return float(dof**0.5 * np.tan(np.interp(probability, share / share[-1], edges[1:])))


def paired(base: np.ndarray, other: np.ndarray) -> list[Interval]:
    """Intervals of a family of figures, both (seeds, figures), that hold all true differences in 95% of experiments.

    Paired t over the seeds; the family by Sidak (1967), which is exact where figures are independent and cautious
    where they are correlated.
    """
    change = (other - base) / np.abs(base.mean(0))
    seeds, figures = change.shape
    critical = t_quantile((1 + CONFIDENCE ** (1 / figures)) / 2, seeds - 1)
    mean, half = change.mean(0), critical * change.std(0, ddof=1) / seeds**0.5
    return [Interval(*row) for row in np.stack([mean, mean - half, mean + half], 1).tolist()]


def compare_runs(base: list[Figures], other: list[Figures]) -> dict[str, Interval]:
    """Differences by figure; errors by noise level are one family, every other figure is alone."""
    levels = [name for name in base[0] if name.startswith(LEVEL)]
    found: dict[str, Interval] = {}
    for family in (levels, *([name] for name in base[0] if name not in levels)):
        sides = (np.array([[run[n] for n in family] for run in side]) for side in (base, other))
        found |= dict(zip(family, paired(*sides), strict=True))
    return found


def draw(differences: dict[str, dict[str, Interval]]) -> Figure:
    """Differences of the held-out error in % by log SNR, a curve with intervals for each variant."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="log SNR", ylabel="x0 error, % more than base")
    for number, (variant, found) in enumerate(differences.items()):
        levels = {int(n.removeprefix(LEVEL)): d for n, d in found.items() if n.startswith(LEVEL)}
        change, low, _ = 100 * np.array(list(levels.values())).T
        x = np.array(list(levels)) + 0.08 * number
        axes.errorbar(x, change, change - low, marker="o", capsize=3, label=variant)
    axes.axhline(0, color="black", linewidth=1)
    axes.grid(alpha=0.4)
    axes.legend(frameon=False)
    return figure


def write(runs: dict[str, list[Figures]], folder: Path, budget: str) -> Table:
    """Write comparison.json and comparison.png; returns the table, the first of the runs being the base."""
    base = next(iter(runs.values()))
    others = {name: compare_runs(base, own) for name, own in list(runs.items())[1:]}
    plain = {n: {f: i._asdict() for f, i in found.items()} for n, found in others.items()}
    about = {"equal_compute": budget, "runs": runs, "differences": plain}
    write_text(folder / "comparison.json", json.dumps(about, indent=1) + "\n")
    draw(others).savefig(folder / "comparison.png")
    caption = "differences in % with paired 95% intervals, of the errors by level for all levels together; * holds no 0"
    title = f"held-out x0 error by log SNR, their geometric mean, and more; {budget}"
    table = Table("", "base", *others, title=title, caption=caption)
    for name in base[0]:
        cells = [f"{np.mean([run[name] for run in base]):.4g}"]
        for found in others.values():
            change, low, high = (100 * value for value in found[name])
            cells.append(f"{change:+.2f} ± {(high - low) / 2:.2f}{' *' * found[name].found}")
        table.add_row(name.replace(LEVEL, "log SNR "), *cells)
    return table
