"""Configs before and after a run: `flowmill config show|diff|schema`."""

import importlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from data_prep.schema import MANIFEST, read_manifest
from models.command import read_yaml, run_command
from models.config import STAGES, Config, InputError, differences, parse_config
from pipeline.config import CONFIG, RESULTS, TrainConfig, dump_config
from pipeline.objectives.config import PRESETS

CONFIGS = {
    "train": "pipeline.config:TrainConfig",
    "prepare": "data_prep.config:PrepareConfig",
    "fit-vae": "data_prep.config:FitVaeConfig",
    "layer": "data_prep.config:LayerConfig",
}
"""Stage -> the class of its configs."""

OPEN = {
    f"model.{name}"
    for name in ("latent_channels", "latent_downscale", "text_dim", "pooled_dim", "vision_dim")
}
"""Sizes that a config may leave open, to be the data's: a run's folder has them, and each `auto`, resolved."""

Action = Literal["show", "diff", "schema"]


def config_class(stage: str) -> type[Config]:
    """The config of a stage that CONFIGS names; raises InputError for another."""
    if stage not in CONFIGS:
        raise InputError(f"stage {stage!r}: expected one of {', '.join(CONFIGS)}")
    module, name = CONFIGS[stage].split(":")
    return getattr(importlib.import_module(module), name)


def read_config(path: Path, overrides: list[str]) -> Config:
    """A YAML file, or the config of a run's or a dataset's folder; what it has says which stage it is for.

    A dataset does not record where it was written to, nor on how many machines.
    """
    if (path / MANIFEST).is_file():
        tree = {"output": str(path), **read_manifest(path).prepare_config}
    else:
        path = path / CONFIG if path.is_dir() else path
        tree = read_yaml(path, overrides)
    stage = next((stage for stage, key in STAGES.items() if key in tree), None)
    # A layer's config is one of flowmill prepare too.
    stage = "layer" if "base" in tree else stage
    if stage is None:
        keys = ", ".join(f"{key} ({stage})" for stage, key in STAGES.items())
        raise InputError(
            f"{path}: got the keys {', '.join(tree)}, expected one of {keys} among them"
        )
    return parse_config(config_class(stage), tree, str(path))


def json_schema(stage: str) -> dict[str, Any]:
    """The JSON Schema of a stage's YAML: what its class says, and the presets that it accepts."""
    schema = config_class(stage).model_json_schema()
    if objective := schema.get("$defs", {}).get("ObjectiveConfig"):
        names = sorted(read_yaml(PRESETS, []))
        objective["properties"]["preset"] = {"enum": names, "title": "Preset"}
        for part in objective["properties"].values():  # of a preset's section one key may be given
            if "oneOf" in part:
                part["anyOf"] = part.pop("oneOf")
    return schema


def show_differences(first: Config, second: Config, unrecorded: set[str]) -> list[str]:
    """A line for each key that differs, and what a change of it changes."""
    lines = []
    for key, (old, new) in differences(first, second).items():
        section, kind = key.split(".")[0], ""
        resolved = "auto" in (old, new) or (key in OPEN and None in (old, new))
        if section in unrecorded or resolved:
            continue
        if isinstance(first, TrainConfig):
            changes = {"engine": "speed"} | dict.fromkeys(RESULTS, "results")
            kind = f"  (changes {changes.get(section, 'neither results nor speed')})"
        lines.append(f"{key}: {old!r} -> {new!r}{kind}")
    return lines


def main(
    action: Annotated[
        Action, typer.Argument(help="show: resolved; diff: of two; schema: for editors")
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            help="YAML files, runs or datasets, then section.key=value; of schema: train or prepare"
        ),
    ] = None,
) -> None:
    """A config resolved, the difference of two, or a JSON Schema that lets an editor complete the YAML."""
    overrides = [a for a in arguments or [] if "=" in a]
    names = [a for a in arguments or [] if "=" not in a]
    expected = 2 if action == "diff" else 1
    if len(names) != expected or (action == "schema" and overrides):
        raise InputError(f"config {action}: got {len(names)} names, expected {expected}")
    if action == "schema":
        print(json.dumps(json_schema(names[0]), indent=1))
    elif action == "show":
        print(dump_config(read_config(Path(names[0]), overrides)), end="")
    else:
        paths = [Path(name) for name in names]
        first, second = (read_config(path, overrides) for path in paths)
        if type(first) is not type(second):
            raise InputError(f"{names[0]} and {names[1]} are configs of different stages")
        of_dataset = any((path / MANIFEST).is_file() for path in paths)
        unrecorded = {"output", "ray", "publish_every_shards"} if of_dataset else set[str]()
        print("\n".join(show_differences(first, second, unrecorded) or ["no difference"]))


if __name__ == "__main__":
    run_command(main, "configs/README.md")
