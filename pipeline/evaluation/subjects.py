"""What is evaluated: a run's checkpoint or a folder of a diffusers pipeline, and how each draws."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from data_prep.schema import MANIFEST, fingerprint
from models.config import InputError, parse_config
from models.files import file_sha256
from models.weights import brief
from pipeline import distributed
from pipeline.arguments import parse_sampler
from pipeline.config import TrainConfig
from pipeline.data.config import DataConfig, DatasetConfig
from pipeline.data.randomness import make_generator
from pipeline.data.stacks import open_dataset
from pipeline.inference.painter import Draw, Request, drawer
from pipeline.objectives.config import SamplerConfig
from pipeline.runs.trained import Trained


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a run's checkpoint or a diffusers pipeline, and how it draws."""

    path: Path
    name: str  # of its folder among the results
    about: dict[str, Any]
    sampler: SamplerConfig
    make_draw: Callable[[], Draw]
    """Loads what drawing needs."""
    num_classes: int = 0
    """Classes of a class-conditional network, whose prompts are "CLASS" or "CLASS: TEXT"."""


def run_subject(trained: Trained, overrides: list[str], device: torch.device) -> Subject:
    sampler = parse_sampler(trained.config.sampler, overrides)
    trained.config.check_samplers(sampler, guide=trained.guide is not None)
    name = f"step_{trained.step:08d}_{trained.weights}"
    classes = trained.config.model.num_classes
    draw = partial(drawer, trained, device)
    return Subject(trained.run, name, trained.facts, sampler, draw, classes)


def pipeline_subject(
    folder: Path, overrides: list[str], trust_remote_code: bool, device: torch.device
) -> Subject:
    """A diffusers pipeline in a local folder; raises InputError where it would run code unasked."""
    index = json.loads((folder / "model_index.json").read_text())
    if isinstance(index.get("_class_name"), list) and not trust_remote_code:
        raise InputError(
            f"{folder}: has code of its own, {index['_class_name'][0]}.py. Remedy: read it, then "
            "--trust-remote-code"
        )
    recipe = index.get("recipe")
    known = ("num_steps", "guidance_scale", "seed")
    names = [override.removeprefix("sampler.").split("=")[0] for override in overrides]
    if recipe is None and (bad := [name for name in names if name not in known]):
        raise InputError(
            f"override sampler.{bad[0]}: of a stock pipeline only sampler.{', sampler.'.join(known)} can be set"
        )

    def make_draw() -> Draw:
        from diffusers import DiffusionPipeline

        try:
            pipeline: Any = DiffusionPipeline.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
            ).to(device)
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: cannot load the pipeline: {brief(error)}") from error
        pipeline.set_progress_bar_config(disable=True)
        return partial(draw_with, pipeline, bool(recipe))

    about = {"pipeline": str(folder), "model_sha256": model_sha256(folder, index)}
    if recipe is None:
        about["scheduler"] = str(index["scheduler"][1])
    recipe = recipe or {}
    saved = parse_config(SamplerConfig, recipe.get("sampler", {}), f"{folder}: recipe.sampler")
    sampler, classes = parse_sampler(saved, overrides), recipe.get("num_classes", 0)
    return Subject(folder, "pipeline", about, sampler, make_draw, classes)


def model_sha256(folder: Path, index: dict[str, Any]) -> str:
    """Hash of all that decides what a pipeline draws: its components' files and its code. Collective."""
    found = None
    if distributed.is_main():
        parts = [folder / name for name, entry in index.items() if isinstance(entry, list)]
        files = [path for part in parts for path in part.rglob("*") if path.is_file()]
        files += [folder / "model_index.json", *folder.glob("*.py")]
        found = fingerprint({str(path.relative_to(folder)): file_sha256(path) for path in files})
    return distributed.gather_objects(found)[0]


def draw_with(pipeline: Any, ours: bool, requests: list[Request]) -> torch.Tensor:
    """Requests of one size and sampler, from functions of (seed, place): with a pipeline of ours what the run draws."""
    sampler, places = requests[0].sampler, [r.place for r in requests]
    if ours:
        settings = sampler.model_dump(mode="json")
        given = {"sampler": settings, "seed": sampler.seed, "places": places}
    else:
        draws = [make_generator(sampler.seed, "pipeline", place) for place in places]
        generators = [torch.Generator().manual_seed(int(d.integers(2**63))) for d in draws]
        given = {"generator": generators, "guidance_scale": sampler.guidance_scale}
        given["num_inference_steps"] = sampler.num_steps
    given["height"], given["width"] = requests[0].size
    prompts = [request.prompt for request in requests]
    pictures = pipeline(prompt=prompts, **given, output_type="np").images
    return torch.from_numpy(pictures * 255).round().to(torch.uint8).permute(0, 3, 1, 2)


def open_exported(folder: Path, data: Path | None) -> Trained | None:
    """The network and config in the single file of an exported folder, on `data` or the dataset it was trained
    on; None where there is no such file or no such dataset here.
    """
    for path in sorted(folder.glob("[!.]*.safetensors")):
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
        if "flowmill.config" not in about:
            continue
        config = parse_config(TrainConfig, json.loads(about["flowmill.config"]), str(path))
        trained_on = next(iter(config.data.sources.values()))
        source = DatasetConfig(path=str(data)) if data else trained_on
        data = Path(source.path)
        if not (data / MANIFEST).is_file():
            return None
        manifest = open_dataset("data", source).manifest
        codec = json.loads(about["flowmill.data"])["codec"]
        if manifest.codec.weights_sha256 != codec["weights_sha256"]:
            raise InputError(
                f"{data}: its latents are of VAE {manifest.codec.weights_sha256[:12]}, the network's of "
                f"{codec['weights_sha256'][:12]}. Remedy: --heldout 0, or a dataset of that VAE"
            )
        given = {"path": source.path, "layers": source.layers}
        # What training left out is not measured either.
        own = ("exclude", "scores", "filters") if source is trained_on else ()
        given |= {name: getattr(config.data, name) for name in own}
        config = config.model_copy(update={"data": DataConfig.model_validate(given)})
        state = {name: weight.float() for name, weight in load_file(path).items()}
        return Trained(folder, config, manifest, str(folder), state, 0)
    return None
