"""Configs before and after a run: `flowmill config show|diff|schema`."""

import importlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from models.command import read_yaml, run_command
from models.config import Config, InputError, differences, parse_config
from pipeline.config import RESULTS, TrainConfig, dump_config
from pipeline.objectives.config import PRESETS

# Stage -> a key that its configs have and those of the stages after it lack, and the class.
CONFIGS = {
    "train": ("training", "pipeline.config:TrainConfig"),
    "prepare": ("vae", "data_prep.config:PrepareConfig"),
    "fit-vae": ("sources", "data_prep.config:FitVaeConfig"),
}
Action = Literal["show", "diff", "schema"]


def config_class(stage: str) -> type[Config]:
    """The config of a stage that CONFIGS names; raises InputError for another."""
    if stage not in CONFIGS:
        raise InputError(f"stage {stage!r}: expected one of {', '.join(CONFIGS)}")
    module, name = CONFIGS[stage][1].split(":")
    return getattr(importlib.import_module(module), name)


def read_config(path: Path, overrides: list[str]) -> Config:
    """A YAML file, or the config that a run's folder holds; what it has says which stage it is for."""
    path = path / "config.yaml" if path.is_dir() else path
    tree = read_yaml(path, overrides)
    stage = next((stage for stage, (key, _) in CONFIGS.items() if key in tree), None)
    if stage is None:
        keys = ", ".join(f"{key} ({stage})" for stage, (key, _) in CONFIGS.items())
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


def show_differences(first: Config, second: Config, names: tuple[str, str]) -> Table:
    table = Table("key", *names, "changes")
    for key, (old, new) in differences(first, second).items():
        section = key.split(".")[0]
        kind = ""
        if isinstance(first, TrainConfig):
            kind = (
                "results" if section in RESULTS else "speed" if section == "engine" else "neither"
            )
        table.add_row(key, str(old), str(new), kind)
    return table


def main(
    action: Annotated[
        Action, typer.Argument(help="show: resolved; diff: of two; schema: for editors")
    ],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            help="YAML files or runs, then section.key=value; of schema: train or prepare"
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
        first, second = (read_config(Path(name), overrides) for name in names)
        if type(first) is not type(second):
            raise InputError(f"{names[0]} and {names[1]} are configs of different stages")
        table = show_differences(first, second, (names[0], names[1]))
        Console(soft_wrap=True).print(table if table.row_count else "no difference")


if __name__ == "__main__":
    run_command(main)
