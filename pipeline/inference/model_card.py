"""The model card of an exported folder: README.md with curves.png and samples.png."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.config import dump_config
from pipeline.objectives.config import SamplerConfig
from pipeline.runs.trained import Trained

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class History:
    """A run's curves from TensorBoard: tag -> steps and values; and the hours that its steps took."""

    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    hours: float


def read_history(run: Path, global_batch: int) -> History:
    """What a run logged; nothing where its folder of logs is gone."""
    if not (run / "tensorboard").is_dir():
        return History({}, 0.0)
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    tags, curves = events.Tags()["scalars"], {}
    for tag in ("loss/train", "loss/x0_mse", "heldout_ema/loss", "heldout_ema/x0_mse"):
        if tag in tags:
            points = {event.step: event.value for event in events.Scalars(tag)}
            steps = sorted(points)
            curves[tag] = (np.array(steps), np.array([points[step] for step in steps]))
    seconds, last = 0.0, 0
    for event in events.Scalars("speed/images_per_s") if "speed/images_per_s" in tags else []:
        seconds += max(0, event.step - last) * global_batch / event.value
        last = max(last, event.step)
    return History(curves, seconds / 3600)


def draw_curves(curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> "Figure":
    """Every curve in a panel of its own, by step."""
    from matplotlib.figure import Figure

    rows = -(-len(curves) // 2)
    figure = Figure(figsize=(11.2, 3.2 * rows), layout="constrained")
    for number, (tag, (steps, values)) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(rows, 2, number, xlabel="step")
        axes.set_title(tag, loc="left", fontsize="medium")
        axes.plot(steps, values)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.4)
    return figure


def public_name(folder: Path) -> str:
    """The name that a folder will have, which is filled as .NAME.partial."""
    return folder.name.removeprefix(".").removesuffix(".partial")


def model_card(trained: Trained, folder: Path, dtype: str, entry: list[str]) -> str:
    """README.md's text; draws its curves and copies its pictures beside it."""
    config, manifest, run = trained.config, trained.manifest, trained.run
    history = read_history(run, config.training.global_batch)
    parameters = sum(tensor.numel() for tensor in trained.state.values())
    ranks = 1
    if (run / "environment.txt").is_file():
        lines = (run / "environment.txt").read_text().splitlines()
        ranks = next((int(x.split("==")[1]) for x in lines if x.startswith("ranks==")), 1)
    seen = trained.step * config.training.global_batch
    rejected = ", ".join(f"{n:,} {reason}" for reason, n in manifest.counts.rejected.items())
    buckets = ", ".join(f"{b.height}x{b.width} ({b.num_samples:,})" for b in manifest.buckets)
    encoders = ", ".join(f"{n} ({r.path})" for n, r in manifest.text.roles.items())
    pictures = ""
    if history.curves:
        draw_curves(history.curves).savefig(folder / "curves.png")
        pictures += "\n## Curves\n\n![loss by step](curves.png)\n"
    if grids := sorted(run.glob("samples/step_*[0-9].png")):
        shutil.copy(grids[-1], folder / "samples.png")
        prompts = "; ".join(config.monitor.prompts)
        name = grids[-1].stem.replace("_", " ")
        pictures += f"\n## Pictures\n\nDrawn at {name}: {prompts}\n\n![samples](samples.png)\n"
    shape = f"{config.model.kind}, {config.model.size}, {parameters / 1e6:,.1f} M parameters"
    sizes = config.sampler
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
tags: [flowmill, {config.model.kind}]
---

# {public_name(folder)}

{shape}, stored in {dtype}: {trained.weights} weights at step {trained.step:,}. Trained with flowmill.

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{public_name(folder)}", trust_remote_code=True)
pipeline("{(config.monitor.prompts or ["a picture"])[0]}", num_inference_steps={sizes.num_steps}, guidance_scale={sizes.guidance_scale:g}).images[0]
```

`flowmill_pipeline.py` runs the network (`{entry[-1]}`), whose padded text is masked as in training, and samples as
`flowmill sample` does: with `{sizes.name}`, or with another of {", ".join(get_args(SamplerConfig.model_fields["name"].annotation))} by
`sampler={{"name": ...}}`; `seed=` gives the pictures of that seed. `scheduler/` tells other tools of the noise levels.

## Data

{manifest.counts.kept:,} pictures kept of {manifest.counts.seen:,}{f" (rejected: {rejected})" if rejected else ""}, fingerprint
{manifest.fingerprint[:16]}. Sizes: {buckets}. Text encoders: {encoders or "none"}. VAE: {manifest.codec.path}.

## Compute

{trained.step:,} steps of {config.training.global_batch} pictures, {seen:,} seen, {seen / max(manifest.counts.kept, 1):.1f} epochs;
{history.hours:.2f} hours on {ranks} rank{"s" if ranks > 1 else ""}, {history.hours * ranks:.2f} rank-hours, {config.engine.precision}.
{pictures}
## Config

```yaml
{dump_config(config)}```
"""
