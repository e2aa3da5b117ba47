"""What a run is made of: a config fitted to its data, the run's folder, the first weights."""

import importlib.metadata
import os
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_prep.schema import Manifest
from models import build_model
from models.config import InputError, differences
from models.files import write_text
from pipeline import distributed
from pipeline.config import (
    RESULTS,
    TrainConfig,
    dump_config,
    load_run_config,
    sizes_of,
)
from pipeline.data.datasets import SNAPSHOTS, check_fits
from pipeline.data.encoders import encoder_folder
from pipeline.data.loader import Loader
from pipeline.runs.start import load_start
from pipeline.training import checkpoint
from pipeline.training.config import EngineConfig
from pipeline.training.ema import WithEMA
from pipeline.training.engine import build_engine, check_engine, micro_batch_size, native_precision


@dataclass(frozen=True)
class Run:
    """A config that fits its dataset, the model's sizes filled in, and the loader over the data."""

    config: TrainConfig
    loader: Loader
    micro_batch: int

    @property
    def folder(self) -> Path:
        return Path(self.config.run)

    @property
    def device(self) -> torch.device:
        """This rank's GPU where torch sees one, else the CPU."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))

    @property
    def num_parameters(self) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in build_model(self.config.model).parameters())

    def build_model(self) -> nn.Module:
        """The network with its first weights, the same on all ranks: random, or those that the config names.

        A run that has a checkpoint will load it: then the weights are random. Collective.
        """
        config = self.config
        torch.manual_seed(config.seed)
        model = build_model(config.model)
        if checkpoint.candidates(self.folder):
            return model
        if start := config.start_from:
            distributed.say(
                f"{self.folder}: begins with the {start.weights} weights of {start.run}"
            )
            load_start(model, start)
        elif config.model.init_from:
            from models.exchange import load_weights  # imports diffusers

            distributed.say(f"{self.folder}: begins with the weights of {config.model.init_from}")
            load_weights(model, config.model.init_from)
        return model

    def build_engine(self) -> tuple[Any, WithEMA]:
        """DeepSpeed's engine around the network, and the optimizer that it drives. Collective."""
        config = self.config
        batch = config.training.global_batch
        return build_engine(self.build_model(), config.engine, config.optimizer, batch)

    def record(self) -> None:
        """Write down config, code and environment of a run that begins or goes on."""
        path = self.folder / "config.yaml"
        if distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                (self.folder / "git.txt").write_text(_git_state())
                (self.folder / "environment.txt").write_text(_environment())
            write_text(path, dump_config(self.config))


def fit_run(config: TrainConfig) -> Run:
    """Open the dataset and check everything that can be checked before a GPU is touched.

    Raises InputError with each difference between the dataset and the config.
    """
    micro_batch = micro_batch_size(config.engine, config.training.global_batch)
    loader = Loader(
        config.data,
        global_batch=config.training.global_batch,
        seed=config.seed,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        pin=torch.cuda.is_available(),
        record=Path(config.run) / SNAPSHOTS,
        vision=getattr(config.model, "alignment", None) is not None,
    )
    manifest = loader.manifest
    model = config.model.with_sizes(sizes_of(manifest))
    config = config.model_copy(update={"model": model, "engine": _resolve_precision(config)})
    micro_steps = config.training.global_batch // micro_batch // distributed.world_size()
    check_engine(config.engine, config.optimizer, micro_steps)
    where = ", ".join(source.path for source in config.data.sources.values())
    check_fits(manifest, where, model)
    check_encoders(config, manifest)
    return Run(config, loader, micro_batch)


def check_encoders(config: TrainConfig, manifest: Manifest) -> None:
    """Raise InputError where an encoder that the config names is not the one that prepared the data."""
    recorded = {"vae": manifest.codec}
    recorded |= {f"text.{name}": record for name, record in manifest.text.roles.items()}
    given = {f"text.{name}": folder for name, folder in config.encoders.text.items()}
    if config.encoders.vae is not None:
        given["vae"] = config.encoders.vae
    for key, folder in given.items():
        if key not in recorded:
            raise InputError(
                f"encoders.{key}: got a name that the dataset lacks, expected one of {list(manifest.text.roles)}"
            )
        record = recorded[key]
        encoder_folder(record.path, folder, record.weights_sha256, f"encoders.{key}")


def _resolve_precision(config: TrainConfig) -> EngineConfig:
    """Make `precision: auto` one of the two: the run's if it has begun, else what this machine is good at."""
    engine, saved = config.engine, Path(config.run) / "config.yaml"
    if engine.precision != "auto":
        return engine
    begun = load_run_config(saved.parent).engine.precision if saved.is_file() else None
    return engine.model_copy(update={"precision": begun or native_precision()})


def check_run(run: Run, override: bool) -> None:
    """Check that the run's folder, if there is one, holds a run of the same config; raises InputError."""
    path = run.folder / "config.yaml"
    if path.is_file():
        changed = differences(load_run_config(run.folder), run.config)
        unsafe = {k: v for k, v in changed.items() if k.split(".")[0] in RESULTS}
        lines = [f"  {key}: saved {old!r}, given {new!r}" for key, (old, new) in changed.items()]
        if unsafe and not override:
            raise InputError(
                f"{run.folder}: was trained with another config:\n"
                + "\n".join(lines)
                + "\nRemedy: undo "
                "the change, choose another run=FOLDER, or pass --override to go on with the new values."
            )
        if lines:
            distributed.say("config changed since this run's start:\n" + "\n".join(lines))
        if "training.global_batch" in changed:
            old, new = changed["training.global_batch"]
            lr, ratio = run.config.optimizer.lr, new / old
            distributed.say(
                f"training.global_batch is {ratio:g} times what it was, and optimizer.lr {lr:g} as given: nothing "
                f"rescales it. In proportion it would be {lr * ratio:.3g}, by the square root {lr * ratio**0.5:.3g}"
            )


def _git_state() -> str:
    """The code's commit and what differs from it, as far as git knows."""
    here = Path(__file__).parents[2]
    parts = []
    for command in ("rev-parse HEAD", "status --short", "diff HEAD"):
        with suppress(OSError):
            done = subprocess.run(
                ["git", "-C", str(here), *command.split()], capture_output=True, text=True
            )
            parts.append(done.stdout)
    return "\n".join(parts)


def _environment() -> str:
    names = sorted({f"{d.name}=={d.version}" for d in importlib.metadata.distributions()})
    return (
        "\n".join([f"cuda=={torch.version.cuda}", f"ranks=={distributed.world_size()}", *names])
        + "\n"
    )


def describe(run: Run) -> str:
    """What a run will be, for --dry-run."""
    config, loader = run.config, run.loader
    steps, per_epoch = config.training.num_steps, loader.steps_per_epoch(0)
    accumulate = config.training.global_batch // (run.micro_batch * distributed.world_size())
    return "\n".join(
        [
            f"run          {run.folder}"
            + (" (resumes)" if checkpoint.candidates(run.folder) else ""),
            f"data         {loader.manifest.counts.kept:,} pictures, {per_epoch} steps per epoch",
            f"model        {config.model.kind}, {run.num_parameters / 1e6:.1f} M parameters",
            f"steps        {steps:,} ({steps / per_epoch:.1f} epochs) of {config.training.global_batch} pictures",
            f"ranks        {distributed.world_size()} x {run.micro_batch} pictures x {accumulate} accumulated, "
            f"ZeRO {config.engine.zero_stage}, {config.engine.precision}",
        ]
    )


def network_for_sampling(config: TrainConfig, weights: dict, device: torch.device) -> nn.Module:
    """A network with these weights beside the one in training; bf16 on a GPU if it trains in bf16."""
    network = build_model(config.model)
    network.load_state_dict(weights)
    half = config.engine.precision == "bf16" and device.type == "cuda"
    return network.to(device, torch.bfloat16 if half else torch.float32).eval()
