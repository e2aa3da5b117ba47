"""The model card of an exported folder: README.md with curves.png and samples.png."""

import json
import re
import shutil
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_prep.schema import MANIFEST
from pipeline.data.eras import ERAS, left_out_since
from pipeline.data.stacks import open_dataset
from pipeline.objectives.config import SamplerConfig
from pipeline.runs.trained import Trained

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Curves = dict[str, tuple[np.ndarray, np.ndarray]]
"""Steps and values by tag."""


def read_scalars(run: Path, *tags: str) -> Curves:
    """Steps and values of those tags that a run logged; nothing where its folder of logs is gone."""
    if not (run / "tensorboard").is_dir():
        return {}
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    curves = {}
    for tag in tags:
        if tag in events.Tags()["scalars"]:
            points = {event.step: event.value for event in events.Scalars(tag)}
            steps = sorted(points)
            curves[tag] = (np.array(steps), np.array([points[step] for step in steps]))
    return curves


def read_history(run: Path, global_batch: int) -> tuple[Curves, float]:
    """A run's curves, and the hours that its steps took; nothing where its folder of logs is gone."""
    shown = ("loss/train", "loss/x0_mse", "heldout_ema/loss", "heldout_ema/x0_mse")
    curves = read_scalars(run, *shown, "speed/images_per_s")
    steps, rates = curves.pop("speed/images_per_s", (np.empty(0), np.empty(0)))
    seconds = np.sum(np.diff(steps, prepend=0) * global_batch / rates)
    return curves, float(seconds) / 3600


def draw_curves(curves: Curves) -> "Figure":
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


def without_places(tree: Any) -> Any:
    """Plain data with the last part in place of each path and URL, for those who have other disks."""
    if isinstance(tree, dict):
        return {key: without_places(value) for key, value in tree.items()}
    is_place = isinstance(tree, str) and re.match(r"[/~]|\.{1,2}/|\w+://", tree)
    return PurePath(tree).name if is_place else tree


def epochs_of(trained: Trained, images: int) -> str:
    """How many epochs so many pictures are, where every dataset of the run is there."""
    sizes = list[float]()
    for source in trained.config.data.sources.values():
        if not (Path(source.path) / MANIFEST).is_file():
            return ""
        buckets = open_dataset("data", source).manifest.buckets
        sizes.append(source.repeat * sum(bucket.num_samples for bucket in buckets))
    return f", {images / sum(sizes):.2f} epochs" if sum(sizes) else ""


def example_of(trained: Trained, name: str) -> str:
    """Python that draws a picture with the exported folder."""
    config = trained.config
    fallback = "0" if config.model.num_classes else "a picture"
    prompt = (config.monitor.prompts or [fallback])[0]
    sizes = f"num_inference_steps={config.sampler.num_steps}, guidance_scale={config.sampler.guidance_scale:g}"
    return f"""from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({name!r}, trust_remote_code=True)
pipeline({prompt!r}, {sizes}).images[0]"""


def curves_and_pictures(trained: Trained, folder: Path, curves: Curves) -> str:
    """The sections that show files beside the card, which are made here: of the exported step, or left out."""
    sections = ""
    curves = {
        tag: (steps[steps <= trained.step], values[steps <= trained.step])
        for tag, (steps, values) in curves.items()
    }
    if curves:
        draw_curves(curves).savefig(folder / "curves.png")
        sections += "\n## Curves\n\n![loss by step](curves.png)\n"
    sheet = trained.run / "samples" / f"step_{trained.step:08d}.png"
    # What training draws with.
    if sheet.is_file() and trained.weights == "ema":
        shutil.copy(sheet, folder / "samples.png")
        prompts = "\n".join(map(repr, trained.config.monitor.prompts))
        sections += f"\n## Pictures\n\n![samples](samples.png)\n\n```text\n{prompts}\n```\n"
    return sections


def model_card(trained: Trained, folder: Path, dtype: str, entry: list[str], licence: str) -> str:
    """README.md's text; draws its curves and copies its pictures beside it."""
    config, manifest, run = trained.config, trained.manifest, trained.run
    curves, hours = read_history(run, config.training.global_batch)
    parameters = sum(tensor.numel() for tensor in trained.state.values())
    environment = run / "environment.txt"
    text = environment.read_text() if environment.is_file() else ""
    ranks = int(found[1]) if (found := re.search(r"^ranks==(\d+)", text, re.M)) else 1
    seen = trained.step * config.training.global_batch
    rejected = ", ".join(f"{n:,} {reason}" for reason, n in manifest.counts.rejected.items())
    buckets = ", ".join(f"{b.height}x{b.width} ({b.num_samples:,})" for b in manifest.buckets)
    encoders = [(n, role.family, role.weights_sha256) for n, role in manifest.text.used.items()]
    encoders.append(("VAE", manifest.codec.class_name, manifest.codec.weights_sha256))
    frozen = "; ".join(f"{name}: {family}, sha256 {hash_[:16]}" for name, family, hash_ in encoders)
    left_out = "; ".join(left_out_since(run / ERAS))
    shape = f"{config.model.kind}, {config.model.size}, {parameters / 1e6:,.1f} M parameters"
    shown = yaml.safe_dump(without_places(config.model_dump(mode="json")), sort_keys=False)
    return f"""---
license: {json.dumps(licence)}
library_name: diffusers
pipeline_tag: text-to-image
tags: [flowmill, {config.model.kind}]
---

# {folder.name}

{shape}, stored in {dtype}: {trained.weights} weights at step {trained.step:,}. Trained with flowmill.

```python
{example_of(trained, folder.name)}
```

`flowmill_pipeline.py` runs the network (`{entry[-1]}`), whose padded text is masked as in training, and samples as
`flowmill sample` does: with `{config.sampler.name}`, or with another of {", ".join(get_args(SamplerConfig.model_fields["name"].annotation))} by
`sampler={{"name": ...}}`; `seed=` gives the pictures of that seed. `scheduler/` tells other tools of the noise levels.

## Licence

The network's: {licence}. Its encoders keep their own.

## Data

{manifest.counts.kept:,} pictures kept of {manifest.counts.seen:,}{f" (rejected: {rejected})" if rejected else ""}, fingerprint
{manifest.fingerprint[:16]}. Sizes to train on: {buckets}. {frozen}.{f" Pictures left out: {left_out}." if left_out else ""}

## Compute

{trained.step:,} steps of {config.training.global_batch} pictures, {seen:,} seen{epochs_of(trained, seen)};
{hours:.2f} hours on {ranks} rank{"s" if ranks > 1 else ""}, {hours * ranks:.2f} rank-hours, {config.engine.precision}.
{curves_and_pictures(trained, folder, curves)}
## Config

```yaml
{shown}```
"""
