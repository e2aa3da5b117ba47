"""Pictures from a trained run: `python -m pipeline.sample RUN --prompt "red heart" [--prompt ...]`."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from PIL import Image

from models.command import run_command
from models.config import InputError, parse_config
from pipeline.arguments import (
    BatchSize,
    DryRun,
    Guide,
    RunFolder,
    SamplerOverrides,
    Step,
    Weights,
    parse_sampler,
    parse_size,
    read_prompts,
    split_places,
    takes,
)
from pipeline.config import load_run_config
from pipeline.objectives.config import SamplerConfig


def parse_columns(text: str | None, sampler: SamplerConfig) -> dict[str, SamplerConfig]:
    """A sampler for each column of "KEY=VALUE,VALUE...", KEY one of the sampler's, by label; without text one."""
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
            recipe = json.loads(image.info["flowmill"])
        keys = ("prompt", "index", "size", "run", "weights", "step", "model_sha256")
        found = {key: recipe[key] for key in (*keys, *SamplerConfig.model_fields)}
        return found | {"guide": recipe.get("guide")}
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{picture}: expected a PNG that flowmill sample wrote") from error


class Cell(NamedTuple):
    """A picture of the sheet: its prompt, the place of its noise, its sampler and what is said of that."""

    prompt: str
    place: int
    label: str
    sampler: SamplerConfig


@dataclass(frozen=True)
class Options:
    """What to draw, of which weights, and where to."""

    run: RunFolder
    overrides: SamplerOverrides = None
    prompt: Annotated[list[str] | None, typer.Option(help="what to draw; may be repeated")] = None
    prompts_file: Annotated[Path | None, typer.Option(help="one prompt per line")] = None
    suite: Annotated[
        Path | None, typer.Option(help="JSONL (GenEval) or CSV (DPG): prompts, for their scorer")
    ] = None
    images_per_prompt: Annotated[int, typer.Option(min=1)] = 1
    columns: Annotated[
        str | None,
        typer.Option(help="one row per prompt, one column per value: seed=0,1,2, num_steps=10,50"),
    ] = None
    like: Annotated[Path | None, typer.Option(help="draw this PNG of ours again")] = None
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH; the most common bucket's")] = None
    weights: Weights = "ema"
    step: Step = None
    guide: Guide = None
    output: Annotated[Path | None, typer.Option(help="folder; RUN/samples/step_N")] = None
    batch_size: BatchSize = 16
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an earlier output")] = (
        False
    )
    dry_run: DryRun = False


def cells_like(options: Options, recipe: dict[str, Any]) -> tuple[list[Cell], Options]:
    """The one cell that a picture of ours is of, and the options that it was drawn with."""
    o = options
    _, overrides = split_places(o.overrides)
    given = (o.prompt, o.prompts_file, o.suite, o.columns, overrides, o.size, o.guide)
    if any(given) or o.images_per_prompt > 1:
        raise InputError("--like: the picture says what was drawn. Remedy: leave the rest out")
    fields = {key: recipe[key] for key in SamplerConfig.model_fields}
    sampler = parse_config(SamplerConfig, fields, "--like")
    cell = Cell(recipe["prompt"], recipe["index"], "", sampler)
    same = {key: recipe[key] for key in ("weights", "step", "size", "guide")}
    return [cell], replace(options, **same)


def cells_of(options: Options, saved: SamplerConfig, suite: list[str]) -> list[Cell]:
    """The sheet that the options ask for, or that of a suite's prompts, row by row."""
    _, overrides = split_places(options.overrides)
    variants = parse_columns(options.columns, parse_sampler(saved, overrides))
    if suite and (options.prompt or options.prompts_file or options.columns):
        raise InputError("--suite: says what is drawn. Remedy: no --prompt and no --columns")
    prompts = suite or read_prompts(options.prompt or [], options.prompts_file)
    rows = [prompt for prompt in prompts for _ in range(options.images_per_prompt)]
    return [Cell(prompt, i, *v) for i, prompt in enumerate(rows) for v in variants.items()]


@takes(Options)
def main(options: Options) -> None:
    """Draw pictures from prompts with a run's newest checkpoint, EMA weights by default.

    Under torchrun every rank draws its share.
    """
    from pipeline import distributed
    from pipeline.inference import sheet
    from pipeline.inference.painter import Request, largest_bucket
    from pipeline.runs.trained import open_trained

    places, _ = split_places(options.overrides)
    config = load_run_config(options.run, places)
    device = distributed.join(config.engine.timeout_s)
    recipe = read_recipe(options.like) if options.like else None
    suite = sheet.read_suite(options.suite) if options.suite else []
    if recipe:
        cells, options = cells_like(options, recipe)
    else:
        cells = cells_of(options, config.sampler, [entry.prompt for entry in suite])
    config.check_samplers(*(cell.sampler for cell in cells), guide=options.guide is not None)
    size = parse_size(options.size) if options.size else None
    trained = open_trained(options.run, options.weights, options.step, places, options.guide)
    if recipe and recipe["model_sha256"] != trained.model_sha256:
        raise InputError(
            f"{options.like}: was drawn by another model, {recipe['weights']} at step {recipe['step']} of "
            f"{recipe['run']}, than that of {options.run}. Remedy: its own run, or --prompt"
        )
    sizes = [(bucket.height, bucket.width) for bucket in trained.manifest.buckets]
    if size is not None and size not in sizes:
        known = ", ".join(f"{height}x{width}" for height, width in sizes)
        distributed.say(f"note: no picture of {options.size} was trained on, but of {known}")
    size = size or largest_bucket(trained.manifest)
    name = f"step_{trained.step:08d}_{options.weights}"
    folder = options.output or options.run / "samples" / name
    settings = cells[0].sampler.model_dump(mode="json") | trained.facts
    what = f"{len(cells)} pictures of {size[0]}x{size[1]} to {folder}"
    distributed.say(f"{what}: {json.dumps(settings)}")
    if not options.dry_run:
        each = options.images_per_prompt
        paths = [folder / f"{i:05d}_{_slug(cell.prompt)}.png" for i, cell in enumerate(cells)]
        if suite:
            paths = sheet.begin_suite(folder, suite, each)
        else:
            sheet.make_folder(folder, options.overwrite)
        requests = [
            Request(path, c.prompt, c.place, size, c.sampler)
            for path, c in zip(paths, cells, strict=True)
        ]
        labels = [f"{cell.prompt} {cell.label}" for cell in cells]
        across = 0 if suite else 5 if each == 1 else each
        if options.columns:
            across = len({cell.label for cell in cells})
        sheet.draw_sheet(trained, requests, labels, across, options.batch_size, device)
        sheet.join_grids(folder, suite, paths)
    distributed.stop()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "picture"


if __name__ == "__main__":
    run_command(main, "pipeline/README.md#sampling")
