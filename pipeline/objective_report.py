"""What an objective really does, drawn and tabled beside the presets: `flowmill objective CONFIG.yaml`."""

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

from models.config import InputError, parse_config, read_yaml, run_command
from pipeline.objective import PRESETS, Objective, ObjectiveConfig

NUM_DRAWS = 2**17
LIMITS = (-10.0, 10.0)  # of log SNR
BANDS = (-np.inf, -6.0, -2.0, 2.0, 6.0, np.inf)
COLOURS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22")


@dataclass(frozen=True)
class Profile:
    """Of one objective: t as training draws it, with log SNR (-inf at SNR 0) and the weight on the x0 loss."""

    name: str
    t: np.ndarray
    log_snr: np.ndarray
    weight: np.ndarray

    @property
    def ideal_loss(self) -> np.ndarray:
        """The weighted loss of the best denoiser of white latents: their x0 error is 1 / (1 + SNR)."""
        return self.weight / (1 + np.exp(self.log_snr))


def make_profile(name: str, config: ObjectiveConfig, latent_size: tuple[int, int]) -> Profile:
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


# --- the picture: four panels, drawn at twice the size and halved, which smooths the lines -----------

Curve = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Panel:
    """One set of curves; `log` draws log10 of y."""

    title: str
    x_limits: tuple[float, float]
    y_limits: tuple[float, float]
    curves: list[Curve]
    log: bool = False


def make_panels(profiles: list[Profile]) -> list[Panel]:
    t_edges, snr_edges = np.linspace(0, 1, 81), np.linspace(*LIMITS, 161)
    t_middle, snr_middle = (e[:-1] + np.diff(e) / 2 for e in (t_edges, snr_edges))
    of_t = [(t_middle, density(p.t, t_edges)) for p in profiles]
    of_snr = [(snr_middle, density(p.log_snr, snr_edges)) for p in profiles]
    weights, products = [], []
    for profile, (x, samples) in zip(profiles, of_snr, strict=True):
        finite = np.isfinite(profile.log_snr)
        order = np.flatnonzero(finite)[::-1]  # t rises, so log SNR falls
        weight = np.interp(x, profile.log_snr[order], profile.weight[order], np.nan, np.nan)
        weights.append((x, weight))
        # Fewer draws than 50 between two edges say little.
        product = np.where(samples * np.diff(snr_edges) * NUM_DRAWS < 50, np.nan, samples * weight)
        products.append((x, product / np.interp(0.0, x, product)))
    t_top, snr_top = (
        nice_limit(max(float(y.max()) for _, y in curves)) for curves in (of_t, of_snr)
    )
    return [
        Panel("density of t  (0 data, 1 noise)", (0, 1), (0, t_top), of_t),
        Panel("density of log SNR  (left noise, right data)", LIMITS, (0, snr_top), of_snr),
        Panel("weight on the x0 loss, against log SNR", LIMITS, (-4, 4), weights, log=True),
        Panel(
            "effective weight: density x weight, 1 at SNR 1", LIMITS, (-2, 2), products, log=True
        ),
    ]


def nice_limit(top: float) -> float:
    """A round number above `top` that four steps divide into round numbers."""
    power = 10 ** np.floor(np.log10(top))
    return float(next(m * power for m in (1, 2, 4, 6, 8, 10, 20) if m * power >= top))


def draw(profiles: list[Profile]) -> Image.Image:
    """All profiles in four panels, the first thick and dark."""
    scale, width, height, legend = 2, 560, 320, 56
    sheet = Image.new("RGB", (2 * width * scale, (2 * height + legend) * scale), "white")
    pen = ImageDraw.Draw(sheet)
    colours = ["#111111", *COLOURS]
    for number, panel in enumerate(make_panels(profiles)):
        corner = (number % 2 * width * scale, (legend + number // 2 * height) * scale)
        draw_panel(pen, panel, corner, (width * scale, height * scale), scale, colours)
    font = ImageFont.load_default(13 * scale)
    for number, profile in enumerate(profiles):
        x, y = (20 + number % 4 * 270) * scale, (10 + number // 4 * 22) * scale
        line = (x, y + 8 * scale, x + 28 * scale, y + 8 * scale)
        pen.line(line, colours[number % len(colours)], (4 if number == 0 else 2) * scale)
        pen.text((x + 36 * scale, y), profile.name, "black", font)
    return sheet.resize((sheet.width // scale, sheet.height // scale), Image.Resampling.LANCZOS)


def draw_panel(
    pen: ImageDraw.ImageDraw,
    panel: Panel,
    corner: tuple[int, int],
    size: tuple[int, int],
    scale: int,
    colours: list[str],
) -> None:
    left, top = corner[0] + 52 * scale, corner[1] + 30 * scale
    right, bottom = corner[0] + size[0] - 16 * scale, corner[1] + size[1] - 30 * scale
    (x0, x1), (y0, y1) = panel.x_limits, panel.y_limits

    def place(x: float, y: float) -> tuple[float, float]:
        y = min(max(y, y0 - 0.1 * (y1 - y0)), y1 + 0.1 * (y1 - y0))
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (
            bottom - top
        )

    font = ImageFont.load_default(11 * scale)
    pen.text(
        (left, corner[1] + 8 * scale), panel.title, "black", ImageFont.load_default(13 * scale)
    )
    for tick in np.linspace(x0, x1, 6):
        x, _ = place(tick, y0)
        pen.line((x, top, x, bottom), "#e4e4e4", scale)
        pen.text((x, bottom + 5 * scale), f"{tick:g}", "#444444", font, anchor="ma")
    for tick in np.linspace(y0, y1, 5):
        _, y = place(x0, tick)
        pen.line((left, y, right, y), "#e4e4e4", scale)
        text = f"{10**tick:g}" if panel.log else f"{tick:.2g}"
        pen.text((left - 6 * scale, y), text, "#444444", font, anchor="rm")
    for number in reversed(range(len(panel.curves))):
        xs, ys = panel.curves[number]
        with np.errstate(divide="ignore", invalid="ignore"):
            ys = np.log10(ys) if panel.log else ys
        points = [place(x, y) for x, y in zip(xs, ys, strict=True) if np.isfinite(y)]
        inside = [p for p in points if top - 1 <= p[1] <= bottom + 1]
        pen.line(inside, colours[number % len(colours)], (4 if number == 0 else 2) * scale, "curve")
    pen.rectangle((left, top, right, bottom), outline="#888888", width=scale)


def main(
    config: Annotated[Path, typer.Argument(help="YAML file with an `objective` section")],
    overrides: Annotated[list[str] | None, typer.Argument(help="objective.key=value")] = None,
    output: Annotated[Path, typer.Option(help="the picture")] = Path("objective.png"),
    latent_size: Annotated[
        str, typer.Option(help="HEIGHTxWIDTH in latent pixels, for shifts")
    ] = "32x32",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="the table alone")] = False,
) -> None:
    """Show what the configured objective trains, against the presets."""
    match = re.fullmatch(r"(\d+)x(\d+)", latent_size)
    if not match:
        raise InputError(f"--latent-size: got {latent_size!r}, expected HEIGHTxWIDTH such as 32x32")
    size = int(match[1]), int(match[2])
    section = read_yaml(config, overrides or []).get("objective", {})
    chosen = parse_config(ObjectiveConfig, section, f"{config}: objective")
    profiles = [make_profile("this config", chosen, size)]
    for name in read_yaml(PRESETS, []):
        preset = parse_config(ObjectiveConfig, {"preset": name}, str(PRESETS))
        profiles.append(make_profile(name, preset, size))
    console = Console(width=110)
    print_table(profiles, console)
    if not dry_run:
        output.parent.mkdir(parents=True, exist_ok=True)
        draw(profiles).save(output)
        console.print(
            f"{output}: density of t, log SNR, weight and effective weight", highlight=False
        )


if __name__ == "__main__":
    run_command(main)
