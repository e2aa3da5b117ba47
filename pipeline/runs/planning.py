"""What a run will take: memory, hours, disk and bandwidth."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from models.command import duration
from models.conditions import example_conditions
from models.config import InputError
from models.layers import positions_2d, rope_2d
from models.networks import TransformerConfig, build_model
from pipeline.config import TrainConfig, sizes_of
from pipeline.data.loader import Loader
from pipeline.runs.setup import fit_data
from pipeline.training.engine import BUCKET_ELEMENTS, PERSISTENT_ELEMENTS
from pipeline.training.flops import PEAK_TFLOPS, ModelFlops

GIB = 2**30
# Of a GPU's memory: the rest is CUDA's context, NCCL's buffers, kernels' workspaces and fragments.
USABLE = 0.9
Stage = Literal[0, 1, 2, 3]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class StateBytes:
    """Bytes on each rank that do not depend on the batch, as DeepSpeed lays them out (tests measure it)."""

    weights: float
    gradients: float  # at the end of backward
    optimizer: float  # fp32 masters where they are apart, two moments, the averages
    buffers: float  # of communication

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.buffers


def num_small(model: nn.Module) -> int:
    """Elements of the parameters so small that ZeRO 3 leaves them whole."""
    return sum(p.numel() for p in model.parameters() if p.numel() < PERSISTENT_ELEMENTS)


def state_bytes(
    num_parameters: int,
    stage: Stage,
    precision: Precision,
    ranks: int,
    averages: int = 1,
    small: int = 0,
) -> StateBytes:
    """ZeRO (Rajbhandari 1910.02054, table 1) with our averages, fp32 accumulation and DeepSpeed's buckets."""
    size = 2 if precision == "bf16" else 4
    gradients = 4 / ranks if stage else size
    if stage == 1 and precision == "bf16":
        gradients = size + 4  # accumulated whole, beside the 16-bit ones of the step
    weights, bucket = float(num_parameters), 0
    if stage == 3:
        weights = small + num_parameters / ranks  # small ones whole, and their partitions too
        bucket = min(BUCKET_ELEMENTS, num_parameters)
    states = _optimizer_bytes(stage, precision, averages) / (ranks if stage else 1)
    return StateBytes(
        weights * size, num_parameters * gradients, num_parameters * states, float(bucket * size)
    )


def _optimizer_bytes(stage: Stage, precision: Precision, averages: int) -> int:
    """Bytes per parameter: two moments, the averages, and a master where the weight itself is none."""
    return 8 + 4 * averages + (4 if stage or precision == "bf16" else 0)


def checkpoint_bytes(num_parameters: int, averages: int = 1) -> int:
    """Bytes of one checkpoint: masters, two moments and the averages, fp32, in all ranks' files."""
    return num_parameters * 4 * (3 + averages)


@dataclass(frozen=True)
class Sample:
    """What one picture is to the network: latent sides, text tokens, bytes in a shard."""

    height: int
    width: int
    tokens: int
    bytes: float


def activation_bytes(
    model: Any, sample: Sample, precision: Precision, checkpointing: bool
) -> float:
    """Bytes per picture between forward and backward, by torch's tracker on fake tensors: nothing runs.

    Of a transformer of many equal blocks two shallow ones are tracked, and the rest is their difference.
    """
    model = model.model_copy(update={"gradient_checkpointing": checkpointing})
    special = ("routing", "dual_attention_layers")  # by which some blocks differ from others
    if not isinstance(model, TransformerConfig) or any(getattr(model, s, None) for s in special):
        return _tracked_bytes(model, sample, precision)
    depth = model.depth or model.SIZES[model.size][1]
    shallow, deeper = (
        _tracked_bytes(model.model_copy(update={"depth": d}), sample, precision) for d in (3, 5)
    )
    return shallow + (depth - 3) * (deeper - shallow) / 2


def _tracked_bytes(model: Any, sample: Sample, precision: Precision) -> float:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker

    tables = (positions_2d, rope_2d)  # remembered, but not across from fake to real
    for table in tables:
        table.cache_clear()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    batch = 8
    with FakeTensorMode():  # of a real device: on "meta" attention would hold its whole matrix
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # fake weights cannot be cast
        try:
            network = build_model(model)
            size = (sample.height, sample.width)
            x_t = torch.zeros(batch, model.latent_channels, *size)
            conditions = example_conditions(model, batch, size, sample.tokens)
        finally:
            torch.set_default_dtype(default)
        t = torch.zeros(batch)
        tracker = MemTracker()
        tracker.track_external(network)
        with tracker:
            outputs = network(x_t, t, conditions)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            sum(out.float().square().mean() for out in outputs).backward()  # pyright: ignore[reportAttributeAccessIssue]
    for table in tables:
        table.cache_clear()
    peaks = tracker.get_tracker_snapshot("peak").values()
    kinds = [(str(kind), size) for peak in peaks for kind, size in peak.items()]
    return sum(n for kind, n in kinds if kind.endswith((".ACT", ".TEMP", ".OTH"))) / batch


@dataclass(frozen=True)
class Workload:
    """What an epoch of the data brings, and where the numbers come from."""

    origin: str
    doubts: list[str]
    num_pictures: int
    total_bytes: float
    sizes: dict[str, int]  # of the model's config that the data fix
    sample: Sample


def prepared_data(config: TrainConfig) -> Workload:
    """The mean picture of the datasets that the config names; raises InputError where they do not fit it."""
    data, batch = config.data.model_copy(update={"grow": False}), config.training.global_batch
    loader = Loader(data, global_batch=batch, seed=config.seed)
    fit_data(config, loader)
    manifest, mixture = loader.manifest, loader.first.mixture
    trained = np.where(mixture.heldout, 0, mixture.sizes)
    area = (mixture.heights * mixture.widths * trained).sum() / trained.sum()
    side = round(math.sqrt(area) / manifest.codec.downscale)
    longest = [role.view.max_length for role in manifest.text.roles.values()]
    tokens = sum(min(data.text_length or length, length) for length in longest)
    total = float(mixture.bytes.sum())
    return Workload(
        ", ".join(source.path for source in data.sources.values()),
        mixture.doubts(),
        round(loader.first.order.samples_per_epoch),
        total,
        sizes_of(manifest),
        Sample(side, side, tokens, total / int(mixture.sizes.sum())),
    )


def assumed_data(
    pictures: int, resolution: int, downscale: int, tokens: int, model: Any
) -> Workload:
    """For data that do not exist yet; raises InputError where the model's config leaves sizes open."""
    names = ("latent_channels", "text_dim", "pooled_dim")
    sizes = {name: getattr(model, name) for name in names} | {"latent_downscale": downscale}
    missing = [f"model.{name}" for name, value in sizes.items() if value is None]
    if missing:
        raise InputError(
            f"{', '.join(missing)}: missing, and there is no dataset to take them from. "
            f"Remedy: prepare it first, or pass {' '.join(f'{m}=N' for m in missing)}"
        )
    side = resolution // downscale
    arrays = 2 * (2 * sizes["latent_channels"] * side**2 + tokens * sizes["text_dim"] + sizes["pooled_dim"])  # fmt: skip
    # A header of 128 and a tar entry of 512 bytes per member, each padded to 512; captions are short.
    size = arrays + 5 * 1024
    sample = Sample(side, side, tokens, size)
    return Workload("assumed: none is there yet", [], pictures, size * pictures, sizes, sample)


@dataclass(frozen=True)
class Fit:
    """One way to lay the run out: what a GPU holds, and the largest micro-batch that fits."""

    stage: Stage
    checkpointing: bool
    state: StateBytes
    activations: float  # bytes per picture
    micro_batch: int  # 0: not even one picture


def layouts(
    config: TrainConfig, model: Any, network: nn.Module, sample: Sample, gpus: int, memory: float
) -> list[Fit]:
    """Every ZeRO stage that can train it, with and without gradient checkpointing; memory in bytes per GPU."""
    share = config.training.global_batch // gpus
    divisors = [d for d in range(1, share + 1) if share % d == 0]
    precision: Precision = "fp32" if config.engine.precision == "fp32" else "bf16"
    averages, fits = len(config.ema.names()), []
    num_parameters = sum(p.numel() for p in network.parameters())
    small = num_small(network)
    for checkpointing in (False, True):
        activations = activation_bytes(model, sample, precision, checkpointing)
        for stage in (0,) if config.optimizer.kind == "muon" else (0, 1, 2, 3):
            state = state_bytes(num_parameters, stage, precision, gpus, averages, small)
            room = USABLE * memory - state.total
            # At stage 0, micro-batches would be summed in bf16.
            whole = stage == 0 and precision == "bf16"
            valid = divisors[-1:] if whole else divisors
            sizes = [d for d in valid if d * (activations + 2 * sample.bytes) <= room]
            fits.append(Fit(stage, checkpointing, state, activations, max(sizes, default=0)))
    return fits


def best_layout(fits: list[Fit], share: int) -> Fit | None:
    """The first that runs the whole share at once, else the one with the largest micro-batch; checkpointing
    costs a third more arithmetic and stages cost communication, so the plainer one wins a tie."""
    fitting = [f for f in fits if f.micro_batch]
    enough = [f for f in fitting if f.micro_batch >= min(share, 16)]
    return next(iter(enough), max(fitting, key=lambda f: f.micro_batch, default=None))


def communicated_bytes(
    num_parameters: int, stage: Stage, precision: Precision, ranks: int
) -> float:
    """Sent by each rank in a step (1910.02054, section 7): rings of all-reduce, or scatter and gather."""
    size = 2 if precision == "bf16" else 4
    passes = 3 if stage == 3 else 2
    return passes * size * num_parameters * (ranks - 1) / ranks


def memory_table(fits: list[Fit], best: Fit | None, gpu: str) -> Table:
    title = f"GiB a {gpu}; the largest micro-batch that fits"
    table = Table(title=title, title_justify="left")
    for name in ("ZeRO", "checkpointing", "weights", "gradients", "optimizer + EMA", "buffers", "a picture", "micro-batch"):  # fmt: skip
        table.add_column(name, justify="right")
    for fit in fits:
        s, chosen = fit.state, "bold green" if fit is best else None
        numbers = (s.weights, s.gradients, s.optimizer, s.buffers, fit.activations)
        cells = [f"{n / GIB:.3f}" for n in numbers]
        row = [str(fit.stage), "yes" if fit.checkpointing else "no", *cells]
        table.add_row(
            *row, str(fit.micro_batch) if fit.micro_batch else "does not fit", style=chosen
        )
    return table


@dataclass(frozen=True)
class Machines:
    gpus: int
    gpus_per_node: int
    gpu: str
    memory: float  # bytes per GPU
    mfu: float
    price: float | None  # a GPU-hour


def report(config: TrainConfig, data: Workload, machines: Machines, console: Console) -> Fit | None:
    """Print the plan; returns the layout it proposes."""
    model = config.model.with_sizes(data.sizes)
    with torch.device("meta"):
        network = build_model(model)
    num_parameters = sum(p.numel() for p in network.parameters())
    batch, sample = config.training.global_batch, data.sample
    steps = config.training.num_steps
    precision: Precision = "fp32" if config.engine.precision == "fp32" else "bf16"
    fits = layouts(config, model, network, sample, machines.gpus, machines.memory)
    best = best_layout(fits, batch // machines.gpus)
    flops = ModelFlops(model).picture(sample.height, sample.width, sample.tokens)
    rate = machines.gpus * PEAK_TFLOPS[machines.gpu] * 1e12 * machines.mfu / flops
    hours = config.training.images / rate / 3600
    nodes = -(-machines.gpus // machines.gpus_per_node)
    stage = best.stage if best else 3
    sent = communicated_bytes(num_parameters, stage, precision, machines.gpus)
    saved = checkpoint_bytes(num_parameters, len(config.ema.names()))
    kept = config.checkpoint.keep
    if config.checkpoint.keep_every_steps:
        kept += steps // config.checkpoint.keep_every_steps
    lines = [
        ("data", f"{data.origin}: {data.num_pictures:,} pictures, {data.total_bytes / GIB:,.2f} GiB, {sample.bytes / 1024:.1f} KiB each"),
        ("model", f"{model.kind} {getattr(model, 'size', '')}: {num_parameters / 1e6:,.1f} M parameters"),
        ("a picture", f"latents {sample.height} x {sample.width}, {sample.tokens} text tokens, {flops / 1e9:,.1f} GFLOPs forward and backward"),
        ("steps", f"{steps:,} of {batch} pictures; {config.training.images / max(data.num_pictures, 1):.2f} epochs"),
        ("speed", f"{rate:,.0f} pictures/s on {machines.gpus} x {machines.gpu} at a model FLOPs utilisation of {machines.mfu:.0%} ({precision}); {batch / rate:.3f} s per step"),
        ("time", f"{duration(3600 * hours)}, over all GPUs {duration(3600 * hours * machines.gpus)}" + (f", {hours * machines.gpus * machines.price:,.0f} at {machines.price:g} per GPU-hour" if machines.price else "")),
        ("loader", f"{rate * sample.bytes / nodes / 1e6:,.0f} MB/s per node ({nodes}); `flowmill doctor --folder` measures the disk"),
        ("communication", f"{sent / 1e9:.2f} GB per GPU and step, {sent / (batch / rate) / 1e9:.1f} GB/s if it is to hide behind the arithmetic"),
        ("a look", f"{num_parameters * (4 if precision == 'fp32' else 2) / GIB:.2f} GiB more per GPU for as long as it takes; ranks share prompts and held-out samples"),
        ("checkpoints", f"{saved / GIB:.2f} GiB each, {kept} kept: {kept * saved / GIB:,.1f} GiB"),
        *(("note", note) for note in config.notes()),
    ]  # fmt: skip
    for doubt in data.doubts:
        console.print(doubt, style="yellow", highlight=False, markup=False, soft_wrap=True)
    for name, text in lines:
        console.print(Text(f"{name:<14}", "bold"), text, sep="")
    console.print(memory_table(fits, best, machines.gpu))
    if best is None:
        console.print("Nothing fits: a smaller model, a higher --gpus for ZeRO 3, or more memory.")
    return best
