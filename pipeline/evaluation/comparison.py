"""Runs compared: relative differences of their figures, paired over seeds, with intervals."""

import json
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
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

    def __str__(self) -> str:
        return f"{100 * self.change:+.2f} ± {50 * (self.high - self.low):.2f}{' *' * self.found}"


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
    """Differences of the held-out error in %, with intervals, by variant and in each by log SNR."""
    figure = Figure(figsize=(4 + len(differences) / 2, 4.5), layout="constrained")
    axes = figure.add_subplot(ylabel="x0 error, % more than base")
    levels = [name for name in next(iter(differences.values())) if name.startswith(LEVEL)]
    for number, level in enumerate(levels):
        found = np.array([own[level] for own in differences.values()]) * 100
        x = np.arange(len(found)) + 0.1 * (number - len(levels) / 2)
        label, half = f"log SNR {level.removeprefix(LEVEL)}", found[:, 0] - found[:, 1]
        axes.errorbar(x, found[:, 0], half, fmt="o", markersize=3, label=label)
    axes.axhline(0, color="black", linewidth=1)
    axes.set_xticks(range(len(differences)), list(differences), rotation=90)
    axes.grid(alpha=0.4)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def write(runs: dict[str, list[Figures]], folder: Path, budget: str) -> Table:
    """Write comparison.json, .md and .png; returns the table, the first of the runs being the base."""
    base = next(iter(runs.values()))
    others = {name: compare_runs(base, own) for name, own in list(runs.items())[1:]}
    plain = {n: {f: i._asdict() for f, i in found.items()} for n, found in others.items()}
    about = {"equal_compute": budget, "runs": runs, "differences": plain}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "comparison.json", json.dumps(about, indent=1) + "\n")
    draw(others).savefig(folder / "comparison.png")
    caption = "base's means, and differences in % with paired 95% intervals, of the errors by level for all levels together; * holds no 0"
    title = f"held-out x0 error by log SNR, their geometric mean, and more; {budget}"
    columns = [name.replace(LEVEL, "log SNR ") for name in base[0]]
    table = Table("", *columns, box=box.MARKDOWN, title=title, caption=caption)
    table.title_justify = table.caption_justify = "left"
    table.add_row("base", *(f"{np.mean([run[name] for run in base]):.4g}" for name in base[0]))
    for name, found in others.items():
        table.add_row(name, *map(str, found.values()))
    with (folder / "comparison.md").open("w") as file:
        Console(file=file, width=1000).print(table)
    return table
