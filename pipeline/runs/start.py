"""Curricula, several stages in one file, and the weights that a run starts from.

A stage is a run of its own, RUN/NAME, whose config is the file's with the stage's differences:

    stages:
      px256: {data: {path: /data/256}}
      px512: {data: {path: /data/512}, training: {images: 20_000_000},
              objective: {shift: {kind: constant, value: 2}}, model: {position_extent: 16}}
"""

import json
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from torch import Tensor, nn

from models.command import read_yaml
from models.config import InputError, parse_config
from models.layers import PROJECTOR
from pipeline.config import CONFIG, StartConfig, TrainConfig, load_run_config
from pipeline.objectives.config import ObjectiveConfig
from pipeline.objectives.paths import SCHEDULES
from pipeline.training.checkpoint import load_weights, newest_record


def load_stages(path: Path, overrides: list[str]) -> list[TrainConfig]:
    """The runs of a file in order: one, or one per stage; raises InputError."""
    data = read_yaml(path, overrides)
    stages = data.pop("stages", None)
    if stages is None:
        return [parse_config(TrainConfig, data, str(path))]
    if not isinstance(stages, dict) or not all(isinstance(name, str) for name in stages):
        raise InputError(f"{path}: stages: expected names (such as px256) and what differs in each")
    if not data.get("run"):
        raise InputError(f"{path}: run: missing; the stages' folders are made in it")
    configs: list[TrainConfig] = []
    for name, changes in stages.items():
        tree = OmegaConf.merge(data, changes or {}, {"run": f"{data['run']}/{name}"})
        merged = cast(dict[str, Any], OmegaConf.to_container(tree))
        if configs:
            # The file's own start_from is the first stage's.
            own = cast(dict[str, Any], (changes or {}).get("start_from") or {})
            merged["start_from"] = {"run": configs[-1].run} | own
            # The first stage alone begins with another program's weights.
            merged.get("model", {}).pop("init_from", None)
        stage = parse_config(TrainConfig, merged, f"{path}: stages.{name}")
        for former in configs:
            if stage.start_from and stage.start_from.run == former.run:
                where = f"{path}: stages.{name}: {former.run}"
                check_objective(where, former.objective, stage.objective)
        configs.append(stage)
    return configs


def objective_of(path: Path) -> ObjectiveConfig | None:
    """What the weights in a file or folder of another program learned, as a file there or beside it says."""
    told: dict[str, Any] = {}
    if path.suffix == ".safetensors" and path.is_file():
        with safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {}).get("flowmill.config", "{}"))
    elif path.is_dir():
        told = _beside(path, "model_index.json").get("recipe", {})
    told = told.get("objective") or _of_scheduler(
        _beside(path, "scheduler/scheduler_config.json") if path.is_dir() else {}
    )
    known = {key: told[key] for key in ("path", "prediction") if key in told}
    return parse_config(ObjectiveConfig, known, str(path)) if known else None


def _beside(path: Path, name: str) -> dict[str, Any]:
    file = path.parent / name
    try:
        return json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON ({error})") from error


def _of_scheduler(about: dict[str, Any]) -> dict[str, Any]:
    """The objective behind a scheduler of diffusers; empty where that is none of ours."""
    predicts, flows = (
        about.get("prediction_type", "epsilon"),
        ("FlowMatch" in str(about.get("_class_name"))),
    )
    if flows or predicts == "flow_prediction":
        return {"path": "rectified_flow", "prediction": "flow"}
    betas = tuple(about.get(f"beta_{name}") for name in ("schedule", "start", "end"))
    name = next((name for name, schedule in SCHEDULES.items() if schedule == betas), None)
    if name is None or about.get("trained_betas"):
        return {}
    last = about.get("rescale_betas_zero_snr", False)
    table = {"kind": "vp_discrete", "betas": name, "zero_terminal_snr": last}
    return {"path": table, "prediction": predicts.removesuffix("_prediction")}


def check_objective(where: str, theirs: ObjectiveConfig | None, ours: ObjectiveConfig) -> None:
    """Raise InputError where weights would go on with another task; one that is not known passes."""
    if theirs is not None and theirs.task != ours.task:
        raise InputError(
            f"{where}: its weights learned {theirs.task}, and this run's objective is {ours.task}. Remedy: that "
            "objective here, or other weights"
        )


def check_start(config: TrainConfig) -> None:
    """Raise InputError where the weights that a run begins with learned another task."""
    if (start := config.start_from) and (Path(start.run) / CONFIG).is_file():
        theirs = load_run_config(Path(start.run)).objective
        check_objective(f"start_from.run: {start.run}", theirs, config.objective)
    elif given := config.model.init_from:
        check_objective(f"model.init_from: {given}", objective_of(Path(given)), config.objective)


def finished(config: TrainConfig) -> bool:
    """Whether a run's latest checkpoint is of its last step."""
    record = newest_record(Path(config.run))
    return record["clock"]["images_seen"] >= config.training.images


def load_start(model: nn.Module, config: StartConfig) -> None:
    """Put a run's weights in `model`; raises InputError for another network's. Collective."""
    weights, _ = load_weights(Path(config.run), config.weights, config.step)
    own = model.state_dict()
    # Alignment may begin or end with a stage; its projector begins untrained.
    weights = {n: t for n, t in weights.items() if n in own or not n.startswith(PROJECTOR)}
    weights |= {n: t for n, t in own.items() if n.startswith(PROJECTOR) and n not in weights}
    if others := sorted(own.keys() ^ weights.keys()):
        raise InputError(
            f"start_from.run: {config.run} has another network: {len(others)} parameters are in one of "
            f"the two, such as {others[0]}"
        )
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            if not name.endswith("position_table"):
                raise InputError(
                    f"start_from.run: {config.run}: {name}: got {tuple(tensor.shape)}, expected "
                    f"{tuple(own[name].shape)}"
                )
            weights[name] = resize_positions(tensor, len(own[name]))
    model.load_state_dict(weights)


def resize_positions(table: Tensor, count: int) -> Tensor:
    """A square grid's positions (G * G, D) resized bicubically as for ViT (2010.11929, 3.2)."""
    old, new = (round(n**0.5) for n in (len(table), count))
    grid = table.view(1, old, old, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic")
    return grid.permute(0, 2, 3, 1).reshape(count, -1)
