"""What a run is made of: a config that fits its data, the run's folder, the first weights."""

import importlib.metadata
import math
import shutil
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path

import torch
from torch import nn

from data_prep.schema import Manifest
from data_prep.schema.recorded import codec_folder, encoder_folder
from models.config import InputError, differences
from models.files import write_text
from models.networks import NetworkConfig, build_model
from pipeline import distributed
from pipeline.config import (
    CONFIG,
    MOVABLE,
    RESULTS,
    TrainConfig,
    dump_config,
    load_run_config,
    sizes_of,
)
from pipeline.data.config import DataConfig
from pipeline.data.datasets import Difference, Mixture, refuse
from pipeline.data.eras import ERAS
from pipeline.data.loader import Loader
from pipeline.runs.start import conversion, in_its_terms, load_start, objective_of
from pipeline.training import checkpoint
from pipeline.training.clock import Clock
from pipeline.training.engine import check_engine, micro_batch_size, resolved
from pipeline.training.first_weights import build_drawn, placement

SCHEDULE = {"training.images"} | {
    f"optimizer.{n}" for n in ("schedule", "warmup_images", "decay_images")
}
"""What the learning rate of a step depends on, beside its peak."""


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
    def begun(self) -> bool:
        """Whether anything of it is kept; until then it may become another run."""
        return bool(checkpoint.candidates(self.folder))

    @cached_property
    def num_parameters(self) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in build_model(self.config.model).parameters())

    def build_model(self) -> nn.Module:
        """The network with its first weights, on all ranks alike: random, or as the config says.

        They are 0 where the run has a checkpoint, which will be loaded. Collective.
        """
        config, begins = self.config, f"{self.folder}: begins with the"
        start, seed = config.start_from, config.weights_seed
        seed = config.seed if seed is None else seed
        if self.begun or not (start or config.model.init_from):
            place = placement(config.engine, config.training.global_batch)
            return build_drawn(config.model, None if self.begun else seed, place)
        # Weights of others are read whole, by every rank, and cut afterwards.
        model = build_drawn(config.model, seed)
        if start:
            distributed.say(f"{begins} {start.weights} weights of {start.run}")
            load_start(model, start)
        elif config.model.init_from:
            # Imports diffusers.
            from models.exchange import load_weights

            known = objective_of(Path(config.model.init_from)) is not None
            task = config.objective.own.task
            doubt = "" if known else f", taken to have learned {task}: nothing says so"
            distributed.say(f"{begins} weights of {config.model.init_from}{doubt}")
            load_weights(model, config.model.init_from)
        if config.objective.network:
            distributed.say(f"{self.folder}: {conversion(config.objective, self.loader.manifest)}")
        return model

    def record(self) -> None:
        """Write down the config, and, where the run begins, code, environment and data. Collective."""
        eras = self.folder / ERAS
        if distributed.is_main():
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.begun:
                (self.folder / "git.txt").write_text(_git_state())
                (self.folder / "environment.txt").write_text(_environment())
                shutil.rmtree(eras, ignore_errors=True)
            write_text(self.folder / CONFIG, dump_config(self.config))
        # Nobody reads which data were agreed on in an attempt of which nothing is kept.
        distributed.barrier()
        self.loader.eras.folder = eras


def fit_run(config: TrainConfig) -> Run:
    """Open the dataset and check all that can be checked before a GPU is used.

    Raises InputError with each difference between dataset and config.
    """
    folder, batch, ranks = Path(config.run), config.training.global_batch, distributed.world_size()
    micro_batch = micro_batch_size(config.engine, batch)
    begun = bool(checkpoint.candidates(folder))
    loader = Loader(
        config.data,
        global_batch=batch,
        seed=config.seed,
        rank_of=(distributed.rank(), ranks),
        eras=folder / ERAS if begun else None,
        model=config.model,
    )
    config = in_its_terms(fit_data(config, loader))
    engine = resolved(config.engine, load_run_config(folder).engine if begun else None)
    check_engine(engine, batch // micro_batch // ranks)
    config = config.model_copy(update={"engine": engine})
    mixture = loader.first.mixture
    for line in (*mixture.doubts(), *mixture.epochs(config.training.images)):
        distributed.say(line)
    return Run(config, loader, micro_batch)


def fit_data(config: TrainConfig, loader: Loader) -> TrainConfig:
    """The config with the sizes of the model that the data fix; raises InputError where they do not fit."""
    model = config.model.with_sizes(sizes_of(loader.manifest))
    check_fits(loader.first.mixture, model, config.data)
    check_encoders(config, loader.manifest)
    return config.model_copy(update={"model": model})


def check_fits(mixture: Mixture, model: NetworkConfig, data: DataConfig | None = None) -> None:
    """Raise InputError with every misfit of data and config; a size of 0 fits any."""
    manifest, sizes = mixture.manifest, sizes_of(mixture.manifest)
    codec, vision, own = manifest.codec, manifest.vision, dict(model)
    pairs: list[Difference] = [("latent channels", codec.channels, model.latent_channels)]
    # Each is asked for by an option, without which it is not compared.
    asked = {
        "text width": (sizes["text_dim"], model.text_dim),
        "pooled text width": (sizes["pooled_dim"], model.pooled_dim),
        "pixels per latent pixel": (codec.downscale, own.get("latent_downscale")),
        "size and crop": ("micro" in manifest.members, model.size_conditioning),
        "class labels": ("label" in manifest.members, model.num_classes > 0),
    }
    pairs += [(name, got, want) for name, (got, want) in asked.items() if want]
    if own.get("alignment") is not None:
        # One patch of the network stands for a square of so many pixels.
        cell = model.latent_multiple * codec.downscale
        pairs.append(("vision_encoder.patch_pixels", vision and vision.patch_pixels, cell))
        pairs.append(("width of the vision features", vision and vision.dim, own["vision_dim"]))
    for dataset in mixture.datasets if model.num_classes else ():
        classes = max(generation.num_labels for generation in dataset.manifest.generations)
        if classes > model.num_classes:
            what = f"classes of {dataset.source.path}"
            pairs.append((what, classes, f"at most model.num_classes, {model.num_classes}"))
        names = enumerate(zip_longest(dataset.manifest.classes, manifest.classes))
        pairs += [(f"class {i} of {dataset.source.path}", *both) for i, both in names]
    text = manifest.text
    longest = max((text.shape(group[0])[0] for group in text.tokens), default=0)
    if data and (data.text_length or 0) > longest:
        pairs.append(("longest text", longest, f"at least data.text_length, {data.text_length}"))
    if data and (data.text_length or data.pad_text == "longest"):
        whole = [name for name in text.names if text.unmasked(name)]
        what = "encoders whose padding the network reads, which no text_length or pad_text suits"
        pairs.append((what, whole, []))
    most = math.inf if own.get("rope") else own.get("position_grid", math.inf)
    for bucket in mixture.buckets() | mixture.buckets(heldout=True):
        sides = tuple(side // codec.downscale for side in bucket)
        what = f"latents of bucket {bucket[0]}x{bucket[1]}"
        if any(side % model.latent_multiple for side in sides):
            pairs.append((what, sides, f"multiples of {model.latent_multiple}"))
        if max(sides) > most * model.latent_multiple:
            limit = f"at most {most * model.latent_multiple}, model.position_grid patches"
            pairs.append((what, sides, limit))
    where = ", ".join(dataset.source.path for dataset in mixture.datasets)
    remedy = "change the config, or prepare the pictures again with what it names"
    refuse(f"{where}: does not fit the training config", pairs, remedy)


def check_encoders(config: TrainConfig, manifest: Manifest) -> None:
    """Raise InputError where the config names an encoder that did not prepare the data."""
    roles = manifest.text.roles
    if config.encoders.vae is not None:
        codec_folder(manifest.codec, config.encoders.vae)
    for name, folder in config.encoders.text.items():
        if name not in roles:
            raise InputError(
                f"encoders.text.{name}: got a name that the dataset lacks, expected one of {list(roles)}"
            )
        encoder_folder(roles[name], folder, f"text.{name}")


def check_run(run: Run, override: bool) -> None:
    """Raise InputError where the run has begun with a config that gives other results.

    A longer or another schedule does not where every step so far has had the learning rate that it gives.
    """
    if not run.begun:
        return
    saved = load_run_config(run.folder)
    changed, why = differences(saved, run.config), ""
    lines = "\n".join(f"  {k}: saved {old!r}, given {new!r}" for k, (old, new) in changed.items())
    refused = {k for k in changed if k.split(".")[0] in RESULTS and not MOVABLE.fullmatch(k)}
    # What a run began with may have moved, or be gone.
    origins = {key for key in refused if key in ("start_from.run", "model.init_from")}
    refused -= {key for key in origins if not Path(changed[key][0] or ".").exists()}
    if refused and refused <= SCHEDULE:
        images = checkpoint.newest_record(run.folder)["clock"]["images_learned"]
        done = range(images // saved.training.global_batch)
        before, after = Clock(saved).lr_of, Clock(run.config).lr_of
        step = next((step for step in done if before(step) != after(step)), None)
        why = f"\nBy the new schedule step {step} would have had another learning rate."
        refused = refused if step is not None else set()
    if refused and not override:
        raise InputError(
            f"{run.folder}: was trained with another config:\n{lines}{why}\nRemedy: undo the change, choose "
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
    git = ["git", "-C", str(Path(__file__).parents[2])]
    commands = ([*git, *c.split()] for c in ("rev-parse HEAD", "status --short", "diff HEAD"))
    with suppress(OSError):
        done = [subprocess.run(command, capture_output=True, text=True) for command in commands]
        return "\n".join(each.stdout for each in done)
    return ""


def _environment() -> str:
    names = sorted({f"{d.name}=={d.version}" for d in importlib.metadata.distributions()})
    facts = [f"cuda=={torch.version.cuda}", f"ranks=={distributed.world_size()}"]
    return "\n".join([*facts, *names, ""])


def describe(run: Run) -> str:
    """What a run will be, or is."""
    config, loader, batch = run.config, run.loader, run.config.training.global_batch
    steps, per_epoch = config.training.num_steps, loader.first.order.samples_per_epoch
    ranks, resumes = distributed.world_size(), run.begun
    return "\n".join(
        [
            f"run          {run.folder}{' (resumes)' * resumes}",
            f"data         {per_epoch:,.0f} pictures per epoch",
            f"model        {config.model.kind}, {run.num_parameters / 1e6:.1f} M parameters",
            f"steps        {steps:,} ({steps * batch / per_epoch:.2f} epochs) of {batch} pictures",
            f"ranks        {ranks} x {run.micro_batch} pictures x {batch // (run.micro_batch * ranks)} accumulated, "
            f"ZeRO {config.engine.zero_stage}, {config.engine.precision}{', compiled' * (config.engine.compile is True)}, "
            f"on {'GPUs' if torch.cuda.is_available() else 'the CPU: torch sees no GPU'}",
            *(f"note         {note}" for note in config.notes()),
        ]
    )


def sampling_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The dtype in which a run's network draws: bf16 on a GPU if training is in bf16."""
    half = config.engine.precision == "bf16" and device.type == "cuda"
    return torch.bfloat16 if half else torch.float32


def network_for_sampling(config: TrainConfig, weights: dict, device: torch.device) -> nn.Module:
    """A network of these very tensors, as far as they have the device and dtype for it."""
    with torch.device("meta"):
        network = build_model(config.model)
    network.load_state_dict(weights, assign=True)
    return network.to(device, sampling_dtype(config, device)).requires_grad_(False).eval()
