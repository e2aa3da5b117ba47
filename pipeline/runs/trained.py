"""A run at one checkpoint, for sampling, evaluation and export."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.schema import Manifest, fingerprint
from data_prep.schema.recorded import Encoders, load_encoders
from models.config import InputError
from models.layers import PROJECTOR
from pipeline.config import TrainConfig, load_run_config
from pipeline.data.datasets import Difference, check_same, encoded_otherwise, refuse
from pipeline.data.eras import ERAS, recorded_manifest
from pipeline.data.stacks import open_dataset
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
    guide: "Trained | None" = None
    """What guidance leads away from, in place of this network without a prompt."""

    @cached_property
    def model_sha256(self) -> str:
        """Hash of all that decides what is drawn of a prompt: weights, network, objective, codec, text encoders."""
        text = self.manifest.text.model_dump(mode="json", exclude={"roles": {"__all__": {"path"}}})
        return fingerprint(
            {
                "weights": tensors_sha256(self.state),
                **({"guide": self.guide.model_sha256} if self.guide else {}),
                "network": self.config.model.model_dump(mode="json", exclude={"init_from"}),
                "objective": self.config.objective.model_dump(mode="json"),
                "codec": self.manifest.codec.model_dump(mode="json", exclude={"path"}),
                "text": text,
            }
        )

    @property
    def facts(self) -> dict[str, Any]:
        made_by = {"run": str(self.run), "step": self.step, "weights": self.weights}
        made_by |= {"model_sha256": self.model_sha256}
        if guide := self.guide:
            of = "" if guide.run == self.run else f"{guide.run}:"
            made_by["guide"] = f"{of}{guide.weights}@{guide.step}"
        return made_by

    def network(self, device: torch.device) -> nn.Module:
        return network_for_sampling(self.config, self.state, device)

    def encoders(self, device: torch.device) -> Encoders:
        folders = self.config.encoders
        return load_encoders(self.manifest, folders.vae, folders.text, device)


def guided_by(trained: Trained, guide: str, places: Sequence[str] = ()) -> Trained:
    """The same led by a guide: weights "NAME" or "NAME@STEP" of its own run, or "RUN:NAME@STEP".

    Raises InputError where latents, text, classes or task of the guide are others, or its weights the same. Collective.
    """
    if not (match := re.fullmatch(r"(?:(.+):)?([^:@]+)(?:@(\d+))?", guide)):
        raise InputError(f"--guide: got {guide!r}, expected NAME, NAME@STEP or RUN:NAME@STEP")
    run, step = Path(match[1] or trained.run), int(match[3]) if match[3] else None
    if step is None and run == trained.run:
        step = trained.step
    found = open_trained(run, match[2], step, places)
    theirs, ours = found.config, trained.config
    tasks = theirs.objective.own.task, ours.objective.own.task
    classes = theirs.model.num_classes, ours.model.num_classes
    pairs: list[Difference] = [("what the network computes", *tasks), ("classes", *classes)]
    pairs += encoded_otherwise(found.manifest, trained.manifest)
    refuse(f"--guide {guide}: does not fit {trained.run}", pairs, "a guide that is told the same")
    if tensors_sha256(found.state) == tensors_sha256(trained.state):
        raise InputError(f"--guide {guide}: has the same weights. Remedy: another step or average")
    return replace(trained, guide=found)


def tensors_sha256(tensors: dict[str, Tensor]) -> str:
    """sha256 of the tensors' bytes in the order of their names."""
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def open_trained(
    run: Path, weights: str, step: int | None, places: Sequence[str] = (), guide: str | None = None
) -> Trained:
    """The newest sound checkpoint of a run, or that of `step`; raises InputError. Collective.

    `places` are overrides for datasets and encoders that have moved; `guide` is as `guided_by` reads it.
    """
    config = load_run_config(run, places)
    name, source = next(iter(config.data.sources.items()))
    # A picture needs the encoders, and of the dataset only what the run has recorded of it.
    manifest = recorded_manifest(run / ERAS) or open_dataset(name, source).manifest
    if any(place.startswith("data.") for place in places):
        check_same(open_dataset(name, source).manifest, manifest, source.path)
    manifest = manifest.arranged(config.data.text)
    state, at_step = load_weights(run, weights, step)
    # Alignment serves training alone.
    if getattr(config.model, "alignment", None) is not None:
        model = config.model.model_copy(update={"alignment": None, "vision_dim": None})
        config = config.model_copy(update={"model": model})
        state = {name: t for name, t in state.items() if not name.startswith(PROJECTOR)}
    trained = Trained(run, config, manifest, weights, state, at_step)
    return trained if guide is None else guided_by(trained, guide, places)
