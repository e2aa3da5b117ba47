"""Pictures from a trained run: `python -m pipeline.sample RUN --prompt "red heart" [--prompt ...]`."""

import json
import re
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from jaxtyping import UInt8
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from data_prep.schema import read_manifest
from models.config import InputError, parse_config, run_command
from pipeline.checkpoint import load_weights
from pipeline.config import load_run_config
from pipeline.objective import Objective
from pipeline.pictures import Painter, grid, largest_bucket, to_pil
from pipeline.sampling import SamplerConfig
from pipeline.train import network_for_sampling


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """Prompts from the arguments and the lines of a file; raises InputError where there are none."""
    lines: list[str] = []
    if file is not None:
        if not file.is_file():
            raise InputError(f"{file}: no such file, expected one prompt a line")
        lines = [line.strip() for line in file.read_text().splitlines()]
    prompts = [*given, *(line for line in lines if line)]
    if not prompts:
        raise InputError('no prompt: got none, expected --prompt "..." or --prompts-file FILE')
    return prompts


def parse_size(text: str) -> tuple[int, int]:
    """ "HEIGHTxWIDTH" in pixels; raises InputError."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise InputError(f"--size: got {text!r}, expected HEIGHTxWIDTH such as 256x256")
    return int(match[1]), int(match[2])


def main(
    run: Annotated[Path, typer.Argument(help="folder of a training run")],
    overrides: Annotated[list[str] | None, typer.Argument(help="sampler.key=value")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="what to draw; may be repeated")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="one prompt a line")] = None,
    images_per_prompt: Annotated[int, typer.Option(min=1)] = 1,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH; the most common bucket's")] = None,
    weights: Annotated[str, typer.Option(help="raw, ema, or another average")] = "ema",
    step: Annotated[int | None, typer.Option(help="of the checkpoint; the newest")] = None,
    output: Annotated[Path | None, typer.Option(help="folder; RUN/samples/step_N")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace an earlier output")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check and describe; write nothing")
    ] = False,
) -> None:
    """Draw pictures from prompts with a run's newest checkpoint, EMA weights by default."""
    config = load_run_config(run)
    sampler = parse_sampler(config.sampler, overrides or [])
    prompts = read_prompts(prompt or [], prompts_file)
    manifest = read_manifest(Path(next(iter(config.data.sources.values())).path))
    height, width = parse_size(size) if size else largest_bucket(manifest)
    state, at_step = load_weights(run, weights, step)
    folder = output or run / "samples" / f"step_{at_step:08d}_{weights}"
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise InputError(
            f"{folder}: holds pictures already. Remedy: --output FOLDER, or --overwrite."
        )
    settings = sampler.model_dump(mode="json") | {
        "run": str(run),
        "step": at_step,
        "weights": weights,
        "size": f"{height}x{width}",
    }
    typer.echo(
        f"{len(prompts) * images_per_prompt} pictures of {height}x{width} to {folder}: {json.dumps(settings)}"
    )
    if dry_run:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    painter = Painter(manifest, prompts, config.encoders.vae, config.encoders.text, device)
    network = network_for_sampling(config, state, device)
    pictures = painter.draw(
        network,
        Objective(config.objective),
        sampler,
        (height, width),
        batch_size,
        images_per_prompt,
    )
    labels = [p for p in prompts for _ in range(images_per_prompt)]
    save_pictures(folder, pictures, labels, settings)
    sheet = grid(pictures, labels, columns=images_per_prompt if images_per_prompt > 1 else 5)
    sheet.save(folder / "grid.png")
    typer.echo(f"{folder / 'grid.png'}: all {len(pictures)}")


def save_pictures(
    folder: Path,
    pictures: UInt8[Tensor, "B 3 H W"],
    prompts: list[str],
    settings: dict[str, Any],
) -> None:
    """A PNG a picture, what made it in its text chunk `flowmill`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (picture, text) in enumerate(zip(pictures, prompts, strict=True)):
        info = PngInfo()
        info.add_itxt("flowmill", json.dumps(settings | {"prompt": text, "index": number}))
        to_pil(picture).save(folder / f"{number:05d}_{_slug(text)}.png", pnginfo=info)


def parse_sampler(saved: SamplerConfig, overrides: list[str]) -> SamplerConfig:
    """The run's sampler with `sampler.key=value` overrides; raises InputError for any other section."""
    data = saved.model_dump()
    for item in overrides:
        key, _, value = item.partition("=")
        if not key.startswith("sampler.") or not value:
            raise InputError(
                f"override {item!r}: expected sampler.key=value; the rest is the run's"
            )
        try:
            data[key.removeprefix("sampler.")] = json.loads(value)
        except ValueError:
            data[key.removeprefix("sampler.")] = value
    return parse_config(SamplerConfig, data, "sampler")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "picture"


if __name__ == "__main__":
    run_command(main)
