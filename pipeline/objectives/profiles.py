"""What an objective really does: the profile of its noise levels and weights, tabled and drawn."""

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.table import Table

from pipeline.objectives.config import ObjectiveConfig
from pipeline.objectives.objective import Objective

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_DRAWS = 2**17
LIMITS = (-10.0, 10.0)  # of log SNR
BANDS = (-np.inf, -6.0, -2.0, 2.0, 6.0, np.inf)


@dataclass(frozen=True)
class Profile:
    """The profile of one objective: t as training draws it, with log SNR (-inf at SNR 0) and the weight on the x0 loss."""

    name: str
    t: np.ndarray
    log_snr: np.ndarray
    weight: np.ndarray

    @property
    def ideal_loss(self) -> np.ndarray:
        """The weighted loss of the best denoiser of white latents: their x0 error is 1 / (1 + SNR)."""
        return self.weight / (1 + np.exp(self.log_snr))


def make_profile(name: str, config: ObjectiveConfig, latent_size: tuple[int, ...]) -> Profile:
    objective = Objective(config)
    t = objective.draw_t(0, 0, NUM_DRAWS, latent_size).sort().values
    alpha, sigma = (c.double().numpy() for c in objective.alpha_sigma(t))
    with np.errstate(divide="ignore"):
        log_snr = 2 * np.log(alpha / np.maximum(sigma, 1e-12))
    return Profile(name, t.numpy(), log_snr, objective.x0_weight(t).double().numpy())


def density(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Share of all draws per unit between `edges`; a discrete level is spread over the gaps beside it."""
    levels, counts = np.unique(values[np.isfinite(values)], return_counts=True)
    middles = levels[:-1] + np.diff(levels) / 2
    ends = (2 * levels[0] - middles[0], 2 * levels[-1] - middles[-1])
    bounds = np.concatenate([ends[:1], middles, ends[1:]])
    share = np.concatenate([[0], np.cumsum(counts)]) / len(values)
    return np.diff(np.interp(edges, bounds, share)) / np.diff(edges)


def print_table(profiles: list[Profile], console: Console) -> None:
    table = Table(
        title="where samples and loss go: % of samples, % of loss, by log SNR",
        caption="loss: of the best denoiser of white latents of variance 1, whose x0 error is 1 / (1 + SNR)",
    )
    table.add_column("objective", no_wrap=True)
    table.add_column("mean t", justify="right")
    table.add_column("SNR 0", justify="right")
    for low, high in itertools.pairwise(BANDS):
        text = f"{low:g} .. {high:g}".replace("-inf ..", "below").replace(".. inf", "and up")
        table.add_column(text, justify="right")
    for number, profile in enumerate(profiles):
        loss = profile.ideal_loss / profile.ideal_loss.sum()
        cells = [f"{profile.t.mean():.3f}", f"{100 * np.isinf(profile.log_snr).mean():.1f}"]
        for low, high in itertools.pairwise(BANDS):
            inside = (profile.log_snr >= low) & (profile.log_snr < high)
            cells.append(f"{100 * inside.mean():3.0f} {100 * loss[inside].sum():3.0f}")
        table.add_row(profile.name, *cells, style="bold" if number == 0 else None)
    console.print(table)


PANELS = (
    ("density of t  (0 data, 1 noise)", (0, 1), (0, None), "linear"),
    ("density of log SNR  (left noise, right data)", LIMITS, (0, None), "linear"),
    ("weight on the x0 loss, against log SNR", LIMITS, (1e-4, 1e4), "log"),
    ("effective weight: density x weight, 1 at SNR 1", LIMITS, (1e-2, 1e2), "log"),
)
"""Title, the limits of x and y, and the scale of y."""


def make_curves(profile: Profile) -> list[tuple[np.ndarray, np.ndarray]]:
    """An objective's curve in each of PANELS."""
    t_edges, snr_edges = np.linspace(0, 1, 81), np.linspace(*LIMITS, 161)
    t, x = (e[:-1] + np.diff(e) / 2 for e in (t_edges, snr_edges))
    samples = density(profile.log_snr, snr_edges)
    order = np.flatnonzero(np.isfinite(profile.log_snr))[::-1]  # t rises, so log SNR falls
    weight = np.interp(x, profile.log_snr[order], profile.weight[order], np.nan, np.nan)
    # Fewer draws than 50 between two edges say little.
    product = np.where(samples * np.diff(snr_edges) * NUM_DRAWS < 50, np.nan, samples * weight)
    effective = product / np.interp(0.0, x, product)
    return [(t, density(profile.t, t_edges)), (x, samples), (x, weight), (x, effective)]


def draw(profiles: list[Profile]) -> "Figure":
    """All profiles in four panels, the first thick and dark."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.2, 7), layout="constrained")
    panels = list(figure.subplots(2, 2).flat)
    for number, profile in enumerate(profiles):
        style = {"color": "black", "linewidth": 3, "zorder": 3} if number == 0 else {}
        for axes, curve in zip(panels, make_curves(profile), strict=True):
            axes.plot(*curve, label=profile.name, **style)
    for axes, (title, x_limits, y_limits, scale) in zip(panels, PANELS, strict=True):
        axes.set_title(title, loc="left", fontsize="medium")
        axes.set(yscale=scale, xlim=x_limits, ylim=y_limits)
        axes.grid(alpha=0.4)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper left", ncols=4, frameon=False)
    return figure
