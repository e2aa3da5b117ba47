"""A run at one checkpoint, for sampling, evaluation and export."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.schema import Manifest, read_manifest
from models.layers import PROJECTOR
from pipeline.config import TrainConfig, load_run_config
from pipeline.data.encoders import Encoders, load_encoders
from pipeline.runs.setup import network_for_sampling
from pipeline.training.checkpoint import load_weights


@dataclass(frozen=True)
class Trained:
    """Weights of a run at one step, and what they belong to."""

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
        folders = self.config.encoders
        return load_encoders(self.manifest, folders.vae, folders.text, device)


def open_trained(run: Path, weights: str, step: int | None) -> Trained:
    """The newest sound checkpoint of a run, or that of `step`; raises InputError. Collective."""
    config = load_run_config(run)
    manifest = read_manifest(Path(next(iter(config.data.sources.values())).path))
    state, at_step = load_weights(run, weights, step)
    # Alignment serves training alone.
    if getattr(config.model, "alignment", None) is not None:
        model = config.model.model_copy(update={"alignment": None})
        config = config.model_copy(update={"model": model})
        state = {name: t for name, t in state.items() if not name.startswith(PROJECTOR)}
    return Trained(run, config, manifest, weights, state, at_step)
