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

from data_prep.schema import Manifest
from models.command import read_yaml
from models.config import InputError, parse_config
from models.layers import PROJECTOR
from pipeline.config import CONFIG, StartConfig, TrainConfig, load_run_config
from pipeline.objectives.config import ObjectiveConfig
from pipeline.objectives.objective import Objective
from pipeline.objectives.paths import SCHEDULES
from pipeline.training.checkpoint import candidates, load_weights, newest_record


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
            if (start := stage.start_from) and start.run == former.run:
                where = f"{path}: stages.{name}: {former.run}"
                carried(where, former.objective, stage.objective, start.convert)
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
    known = {key: told[key] for key in ("path", "prediction", "network") if told.get(key)}
    return parse_config(ObjectiveConfig, known, str(path)) if known else None


def _beside(path: Path, name: str) -> dict[str, Any]:
    file = path.parent / name
    try:
        return json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise InputError(f"{file}: not valid JSON ({error})") from error


def _of_scheduler(about: dict[str, Any]) -> dict[str, Any]:
    """The objective behind a scheduler of diffusers; empty where that is none of ours."""
    predicts = about.get("prediction_type", "epsilon")
    if "FlowMatch" in str(about.get("_class_name")) or predicts == "flow_prediction":
        return {"path": "rectified_flow", "prediction": "flow"}
    betas = tuple(about.get(f"beta_{name}") for name in ("schedule", "start", "end"))
    name = next((name for name, schedule in SCHEDULES.items() if schedule == betas), None)
    if name is None or about.get("trained_betas"):
        return {}
    last = about.get("rescale_betas_zero_snr", False)
    table = {"kind": "vp_discrete", "betas": name, "zero_terminal_snr": last}
    return {"path": table, "prediction": predicts.removesuffix("_prediction")}


def carried(
    where: str, theirs: ObjectiveConfig, ours: ObjectiveConfig, convert: bool | None
) -> ObjectiveConfig:
    """Our objective with `network` as their weights need it; `convert` is None where there is no such option.

    Raises InputError where they learned another task and neither `convert` nor `network` says to carry them over.
    """
    alike, given = theirs.task == ours.task, json.dumps(theirs.own.model_dump(mode="json"))
    remedy = f"objective.network='{given}'" if convert is None else "start_from.convert=true"
    if not (alike or convert or ours.network):
        raise InputError(
            f"{where}: its weights learned {theirs.task}, and this run's objective is {ours.task}. Remedy: that "
            f"objective here, other weights, or {remedy}, which carries these over"
        )
    if alike and convert:
        raise InputError(
            f"{where}: convert has no effect: its weights learned {ours.task}, as here"
        )
    if ours.network not in (None, theirs.own):
        raise InputError(
            f"{where}: its network computes {theirs.own.task}, and objective.network is {ours.network.task}. Remedy: "
            f"objective.network='{given}'"
        )
    return ours.model_copy(update={"network": None if theirs.own.task == ours.task else theirs.own})


def in_its_terms(config: TrainConfig) -> TrainConfig:
    """The config with `objective.network` of the weights that a run has or begins with; raises InputError."""
    objective, start, given = config.objective, config.start_from, config.model.init_from
    if candidates(run := Path(config.run)):
        network = objective.network or load_run_config(run).objective.network
        objective = objective.model_copy(update={"network": network})
    elif start and (Path(start.run) / CONFIG).is_file():
        theirs = load_run_config(Path(start.run)).objective
        objective = carried(f"start_from.run: {start.run}", theirs, objective, start.convert)
    elif given and (theirs := objective_of(Path(given))):
        objective = carried(f"model.init_from: {given}", theirs, objective, None)
    return config.model_copy(update={"objective": objective})


def conversion(config: ObjectiveConfig, manifest: Manifest) -> str:
    """What is to be said of a network that computes in other terms than the objective's."""
    objective, codec = Objective(config), manifest.codec
    bucket = max(manifest.buckets, key=lambda b: b.num_samples)
    size = (codec.channels, bucket.height // codec.downscale, bucket.width // codec.downscale)
    share = objective.share_beyond(objective.draw_t(0, 0, 2**14, size))
    return (
        f"the network computes {config.own.task} and answers in {config.task}; {share:.1%} of the t drawn have a noise "
        "level that its own path lacks, and get the nearest"
    )


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
