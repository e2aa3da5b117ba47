"""Pictures from a trained run: `python -m pipeline.sample RUN --prompt "red heart" [--prompt ...]`."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image
from torch import Tensor, nn

from data_prep.schema import Manifest, read_manifest
from models.config import InputError, parse_config, run_command
from models.layers import PROJECTOR
from pipeline import distributed
from pipeline.checkpoint import load_weights
from pipeline.config import TrainConfig, load_run_config
from pipeline.objective import Objective
from pipeline.pictures import (
    Encoders,
    Request,
    draw_files,
    drawer,
    grid,
    largest_bucket,
    load_encoders,
    read_picture,
)
from pipeline.sampling import SamplerConfig
from pipeline.setup import network_for_sampling


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


def parse_columns(text: str | None, sampler: SamplerConfig) -> dict[str, SamplerConfig]:
    """A sampler a column of "KEY=VALUE,VALUE...", KEY one of the sampler's, by label; without text one."""
    if text is None:
        return {"": sampler}
    key, _, values = text.partition("=")
    if not key or not values:
        raise InputError(f"--columns: got {text!r}, expected such as seed=0,1,2 or num_steps=10,50")
    return {f"{key} {v}": parse_sampler(sampler, [f"sampler.{key}={v}"]) for v in values.split(",")}


def read_recipe(picture: Path) -> dict[str, Any]:
    """What a picture's chunk `flowmill` says; raises InputError where it has none."""
    try:
        with Image.open(picture) as image:
            return json.loads(image.info["flowmill"])
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{picture}: expected a PNG that flowmill sample wrote") from error


@dataclass(frozen=True)
class Trained:
    """A run at one checkpoint."""

    run: Path
    config: TrainConfig
    manifest: Manifest
    weights: str
    state: dict[str, Tensor]
    step: int

    @property
    def facts(self) -> dict[str, Any]:
        return {"run": str(self.run), "step": self.step, "weights": self.weights}

    def network(self, device: torch.device) -> nn.Module:
        return network_for_sampling(self.config, self.state, device)

    def encoders(self, device: torch.device) -> Encoders:
        return load_encoders(
            self.manifest, self.config.encoders.vae, self.config.encoders.text, device
        )


def open_trained(run: Path, weights: str, step: int | None) -> Trained:
    """The newest sound checkpoint of a run, or that of `step`; raises InputError. Collective."""
    config = load_run_config(run)
    manifest = read_manifest(Path(next(iter(config.data.sources.values())).path))
    state, at_step = load_weights(run, weights, step)
    if getattr(config.model, "alignment", None) is not None:  # it was for training
        model = config.model.model_copy(update={"alignment": None})
        config = config.model_copy(update={"model": model})
        state = {name: t for name, t in state.items() if not name.startswith(PROJECTOR)}
    return Trained(run, config, manifest, weights, state, at_step)


def join(timeout_s: float) -> torch.device:
    """This rank's device; under a launcher, in the group of its ranks."""
    if distributed.world_size() > 1:
        return distributed.start(timeout_s)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_folder(folder: Path, overwrite: bool) -> None:
    """A folder for pictures; raises InputError on every rank if it holds anything, unless our pictures may go."""
    old = sorted(folder.glob("*")) if distributed.is_main() else []
    if distributed.gather_objects(bool(old))[0] and not overwrite:
        raise InputError(
            f"{folder}: holds pictures already. Remedy: --output FOLDER, or --overwrite."
        )
    if distributed.is_main():
        for path in old:
            if re.fullmatch(r"\d{5}_.*\.png", path.name):
                path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
    distributed.barrier()


@dataclass(frozen=True)
class Cell:
    """A picture of the sheet: its prompt, the place of its noise, its sampler and what is said of that."""

    prompt: str
    place: int
    label: str
    sampler: SamplerConfig


def cells_like(recipe: dict[str, Any]) -> list[Cell]:
    fields = {key: value for key, value in recipe.items() if key in SamplerConfig.model_fields}
    sampler = parse_config(SamplerConfig, fields, "--like")
    return [Cell(recipe["prompt"], recipe["index"], "", sampler)]


def draw_cells(
    trained: Trained,
    cells: list[Cell],
    size: tuple[int, int],
    folder: Path,
    across: int,
    batch_size: int,
    device: torch.device,
) -> None:
    """A PNG a cell, drawn by all ranks, and grid.png of all. Collective."""
    requests = [
        Request(folder / f"{i:05d}_{_slug(c.prompt)}.png", c.prompt, c.place, size, c.sampler)
        for i, c in enumerate(cells)
    ]
    objective = Objective(trained.config.objective)
    draw = drawer(trained.encoders(device), trained.network(device), objective)
    draw_files(requests, draw, trained.facts, batch_size)
    distributed.barrier()
    if distributed.is_main():
        pictures = torch.stack([read_picture(request.path) for request in requests])
        labels = [f"{cell.prompt} {cell.label}" for cell in cells]
        grid(pictures, labels, columns=across).save(folder / "grid.png")
        distributed.say(f"{folder / 'grid.png'}: all {len(pictures)}")


def main(
    run: Annotated[Path, typer.Argument(help="folder of a training run")],
    overrides: Annotated[list[str] | None, typer.Argument(help="sampler.key=value")] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="what to draw; may be repeated")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="one prompt a line")] = None,
    images_per_prompt: Annotated[int, typer.Option(min=1)] = 1,
    columns: Annotated[
        str | None,
        typer.Option(help="a row a prompt, a column a value: seed=0,1,2, num_steps=10,50"),
    ] = None,
    like: Annotated[Path | None, typer.Option(help="draw this PNG of ours again")] = None,
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
    """Draw pictures from prompts with a run's newest checkpoint, EMA weights by default.

    Under torchrun every rank draws its share.
    """
    config = load_run_config(run)
    device = join(config.engine.timeout_s)
    across = 5
    if like is not None:
        if prompt or prompts_file or columns or overrides or size or images_per_prompt > 1:
            raise InputError("--like: the picture says what was drawn. Remedy: leave the rest out")
        recipe = read_recipe(like)
        weights, step, size = recipe["weights"], recipe["step"], recipe["size"]
        cells = cells_like(recipe)
    else:
        variants = parse_columns(columns, parse_sampler(config.sampler, overrides or []))
        rows = [
            p for p in read_prompts(prompt or [], prompts_file) for _ in range(images_per_prompt)
        ]
        cells = [Cell(p, i, *v) for i, p in enumerate(rows) for v in variants.items()]
        if columns or images_per_prompt > 1:
            across = len(variants) if columns else images_per_prompt
    trained = open_trained(run, weights, step)
    pixels = parse_size(size) if size else largest_bucket(trained.manifest)
    folder = output or run / "samples" / f"step_{trained.step:08d}_{weights}"
    settings = cells[0].sampler.model_dump(mode="json") | trained.facts
    what = f"{len(cells)} pictures of {pixels[0]}x{pixels[1]} to {folder}"
    distributed.say(f"{what}: {json.dumps(settings)}")
    if not dry_run:
        make_folder(folder, overwrite)
        draw_cells(trained, cells, pixels, folder, across, batch_size, device)
    distributed.stop()


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
