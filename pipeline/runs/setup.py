"""What a run is made of: a config that fits its data, the run's folder, the first weights."""

import importlib.metadata
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data_prep.schema import Manifest
from models.config import InputError, differences
from models.files import write_text
from models.networks import NetworkConfig, build_model
from pipeline import distributed
from pipeline.config import CONFIG, RESULTS, TrainConfig, dump_config, load_run_config, sizes_of
from pipeline.data.datasets import Difference, refuse
from pipeline.data.encoders import encoder_folder
from pipeline.data.eras import ERAS
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
    def num_parameters(self) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in build_model(self.config.model).parameters())

    def build_model(self) -> nn.Module:
        """The network with its first weights, on all ranks alike: random, or as the config says.

        They stay random where the run has a checkpoint, which will be loaded. Collective.
        """
        config, begins = self.config, f"{self.folder}: begins with the"
        torch.manual_seed(config.seed)
        model = build_model(config.model)
        if checkpoint.candidates(self.folder):
            return model
        if start := config.start_from:
            distributed.say(f"{begins} {start.weights} weights of {start.run}")
            load_start(model, start)
        elif config.model.init_from:
            # Imports diffusers.
            from models.exchange import load_weights

            distributed.say(f"{begins} weights of {config.model.init_from}")
            load_weights(model, config.model.init_from)
        return model

    def build_engine(self) -> tuple[Any, WithEMA]:
        """DeepSpeed's engine around the network, and the optimizer that it drives. Collective."""
        config, batch = self.config, self.config.training.global_batch
        return build_engine(self.build_model(), config.engine, config.optimizer, batch)

    def record(self) -> None:
        """Write down the config, and, where the run begins, code and environment."""
        path = self.folder / CONFIG
        if distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            if not path.is_file():
                (self.folder / "git.txt").write_text(_git_state())
                (self.folder / "environment.txt").write_text(_environment())
            write_text(path, dump_config(self.config))


def fit_run(config: TrainConfig) -> Run:
    """Open the dataset and check all that can be checked before a GPU is used.

    Raises InputError with each difference between dataset and config.
    """
    micro_batch = micro_batch_size(config.engine, config.training.global_batch)
    loader = Loader(
        config.data,
        global_batch=config.training.global_batch,
        seed=config.seed,
        rank_of=(distributed.rank(), distributed.world_size()),
        eras=Path(config.run) / ERAS,
        model=config.model,
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


def check_fits(manifest: Manifest, where: str, model: NetworkConfig) -> None:
    """Raise InputError with every misfit of dataset and network; a size of 0 fits any."""
    codec, sizes = manifest.codec, sizes_of(manifest)
    pairs: list[Difference] = [("latent channels", codec.channels, model.latent_channels)]
    if model.text_dim:
        pairs.append(("text width", sizes["text_dim"], model.text_dim))
    if model.pooled_dim:
        pairs.append(("pooled text width", sizes["pooled_dim"], model.pooled_dim))
    if model.num_classes:
        pairs.append(("class labels", "label" in manifest.members, True))
    if getattr(model, "alignment", None) is not None:
        # One patch of the network stands for a square of so many pixels.
        vision, cell = manifest.vision, model.latent_multiple * codec.downscale
        pairs.append(("vision_encoder.patch_pixels", vision and vision.patch_pixels, cell))
    for bucket in manifest.buckets:
        sides = bucket.height // codec.downscale, bucket.width // codec.downscale
        if any(side % model.latent_multiple for side in sides):
            what = f"latents of bucket {bucket.height}x{bucket.width}"
            pairs.append((what, sides, f"multiples of {model.latent_multiple}"))
    remedy = "change the config, or prepare the pictures again with what it names"
    refuse(f"{where}: does not fit the training config", pairs, remedy)


def check_encoders(config: TrainConfig, manifest: Manifest) -> None:
    """Raise InputError where the config names an encoder that did not prepare the data."""
    roles = manifest.text.roles
    if config.encoders.vae is not None:
        encoder_folder(manifest.codec, config.encoders.vae, "vae")
    for name, folder in config.encoders.text.items():
        if name not in roles:
            raise InputError(
                f"encoders.text.{name}: got a name that the dataset lacks, expected one of {list(roles)}"
            )
        encoder_folder(roles[name], folder, f"text.{name}")


def _resolve_precision(config: TrainConfig) -> EngineConfig:
    """The engine with `precision: auto` resolved: as the run began, or as is native here."""
    engine, run = config.engine, Path(config.run)
    if engine.precision != "auto":
        return engine
    begun = load_run_config(run).engine.precision if (run / CONFIG).is_file() else None
    return engine.model_copy(update={"precision": begun or native_precision()})


def check_run(run: Run, override: bool) -> None:
    """Raise InputError where the run has begun with a config that gives other results."""
    if not (run.folder / CONFIG).is_file():
        return
    changed = differences(load_run_config(run.folder), run.config)
    lines = "\n".join(f"  {k}: saved {old!r}, given {new!r}" for k, (old, new) in changed.items())
    if not override and any(key.split(".")[0] in RESULTS for key in changed):
        raise InputError(
            f"{run.folder}: was trained with another config:\n{lines}\nRemedy: undo the change, choose "
            "another run=FOLDER, or pass --override to go on with the new values."
        )
    if lines:
        distributed.say(f"config changed since this run's start:\n{lines}")
    if "training.global_batch" in changed:
        old, new = changed["training.global_batch"]
        lr, ratio = run.config.optimizer.lr, new / old
        distributed.say(
            f"training.global_batch is {ratio:g} times what it was, and optimizer.lr {lr:g} as given: nothing "
            f"rescales it. In proportion it would be {lr * ratio:.3g}, by the square root {lr * ratio**0.5:.3g}"
        )


def _git_state() -> str:
    """The code's commit and what differs from it; empty where there is no git."""
    commands = ("rev-parse HEAD", "status --short", "diff HEAD")
    settings: dict[str, Any] = {
        "cwd": Path(__file__).parents[2],
        "capture_output": True,
        "text": True,
    }
    with suppress(OSError):
        return "\n".join(subprocess.run(["git", *c.split()], **settings).stdout for c in commands)
    return ""


def _environment() -> str:
    names = sorted({f"{d.name}=={d.version}" for d in importlib.metadata.distributions()})
    facts = [f"cuda=={torch.version.cuda}", f"ranks=={distributed.world_size()}"]
    return "\n".join([*facts, *names, ""])


def describe(run: Run) -> str:
    """What a run will be, for --dry-run."""
    config, loader, batch = run.config, run.loader, run.config.training.global_batch
    steps, per_epoch = config.training.num_steps, loader.steps_per_epoch(0)
    ranks, resumes = distributed.world_size(), bool(checkpoint.candidates(run.folder))
    return (
        f"run          {run.folder}{' (resumes)' * resumes}\n"
        f"data         {loader.manifest.counts.kept:,} pictures, {per_epoch} steps per epoch\n"
        f"model        {config.model.kind}, {run.num_parameters / 1e6:.1f} M parameters\n"
        f"steps        {steps:,} ({steps / per_epoch:.1f} epochs) of {batch} pictures\n"
        f"ranks        {ranks} x {run.micro_batch} pictures x {batch // (run.micro_batch * ranks)} accumulated, "
        f"ZeRO {config.engine.zero_stage}, {config.engine.precision}"
    )


def network_for_sampling(config: TrainConfig, weights: dict, device: torch.device) -> nn.Module:
    """A network with these weights; bf16 on a GPU if training is in bf16."""
    network = build_model(config.model)
    network.load_state_dict(weights)
    half = config.engine.precision == "bf16" and device.type == "cuda"
    return network.to(device, torch.bfloat16 if half else torch.float32).eval()
