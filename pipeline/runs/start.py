"""Curricula, several stages in one file, and the weights that a run starts from.

A stage is a run of its own, RUN/NAME, whose config is the file's with the stage's differences:

    stages:
      px256: {data: {path: /data/256}}
      px512: {data: {path: /data/512}, training: {images: 20_000_000},
              objective: {shift: {kind: constant, value: 2}}, model: {position_extent: 16}}
"""

from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from models.command import read_yaml
from models.config import InputError, parse_config
from models.layers import PROJECTOR
from pipeline.config import StartConfig, TrainConfig
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
            merged["start_from"] = {"run": configs[-1].run} | (merged.get("start_from") or {})
            # The first stage alone begins with another program's weights.
            merged.get("model", {}).pop("init_from", None)
        configs.append(parse_config(TrainConfig, merged, f"{path}: stages.{name}"))
    return configs


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
