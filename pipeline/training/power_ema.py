"""Averages of the weights of any width, made after training from the snapshots that the run stored.

EDM2 (Karras et al. 2312.02696), section 3.2 and appendix C.3: the wanted profile is the least-squares
combination of the stored power-function averages (`ema.sigma_rels`).
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from models.config import InputError
from pipeline.training.checkpoint import EMA_SNAPSHOTS, RECORD, faults, step_folders
from pipeline.training.config import power_exponent, power_name
from pipeline.training.pieces import Pieces


@dataclass(frozen=True)
class StoredAverage:
    """A power-function average, begun after `begun` pictures, as it was `images` pictures later."""

    folder: Path
    step: int
    begun: int
    images: int
    sigma_rel: float


def read_snapshots(run: Path, step: int | None) -> list[StoredAverage]:
    """Those up to a step (null: all), oldest first; raises InputError where there are none.

    Where some were added later, they are those that began together with the oldest of the last step.
    """
    found = []
    for folder in step_folders(run / EMA_SNAPSHOTS).values():
        if not (folder / RECORD).is_file():
            continue
        about = json.loads((folder / RECORD).read_text())
        found += [
            StoredAverage(folder, about["step"], begun, about["images_seen"] - begun, sigma_rel)
            for sigma_rel, begun in zip(about["sigma_rels"], about["begun"], strict=True)
        ]
    if not found:
        raise InputError(
            f"{run / EMA_SNAPSHOTS}: no snapshots. Remedy: train with ema.sigma_rels=[0.05,0.1] and "
            "ema.snapshot_images; a profile cannot be made after a run that kept none."
        )
    steps = sorted({s.step for s in found})
    if step is not None and step not in steps:
        raise InputError(f"--step: got {step}, expected one with a snapshot: {steps}")
    last = steps[-1] if step is None else step
    begun = min(s.begun for s in found if s.step == last)
    return [s for s in found if s.step <= last and s.begun == begun]


def inner_product(
    t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray
) -> np.ndarray:
    """Integral of the product of two profiles p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1), tau < t.

    EDM2 eq. 152 to 155.
    """
    ratio = np.minimum(t_a, t_b) / np.maximum(t_a, t_b)
    exponent = np.where(t_a < t_b, gamma_b, gamma_a)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return scale * ratio**exponent / np.maximum(t_a, t_b)


def coefficients(
    times: np.ndarray, sigma_rels: np.ndarray, time: float, sigma_rel: float
) -> np.ndarray:
    """Weights, float64 and of sum 1, of averages (times, sigma_rels) that best make the wanted profile.

    EDM2 algorithm 3, on profiles scaled to norm 1, which keeps the system well conditioned.
    """
    t, g = np.asarray(times, np.float64), np.array([power_exponent(s) for s in sigma_rels])
    gram = inner_product(t[:, None], g[:, None], t[None, :], g[None, :])
    goal = inner_product(t, g, np.asarray(time), np.asarray(power_exponent(sigma_rel)))
    norm = np.sqrt(np.diag(gram))
    scaled = np.linalg.lstsq(gram / np.outer(norm, norm), goal / norm, rcond=1e-12)[0]
    weights = scaled / norm
    return weights / weights.sum()


def reconstruct(snapshots: list[StoredAverage], sigma_rel: float) -> dict[str, torch.Tensor]:
    """The weights of that width at the last snapshot's time, summed in float64, returned in fp32."""
    for folder in {s.folder: None for s in snapshots}:
        if found := faults(folder):
            raise InputError(found[0])
    times = np.array([s.images for s in snapshots], np.float64)
    widths = np.array([s.sigma_rel for s in snapshots])
    shares = coefficients(times, widths, times[-1], sigma_rel)
    sums: dict[str, torch.Tensor] = {}
    pairs = list(zip(snapshots, shares.tolist(), strict=True))
    for snapshot, share in track(pairs, "snapshots", transient=True):
        stored = Pieces(snapshot.folder)
        for name in stored.shapes:
            part = stored.whole(power_name(snapshot.sigma_rel), name).double() * share
            sums[name] = sums[name].add_(part) if name in sums else part
    return {name: value.float() for name, value in sums.items()}
