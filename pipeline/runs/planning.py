"""What a run will take: memory, hours, disk and bandwidth."""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from data_prep.schema import Manifest
from models.command import duration
from models.conditions import example_conditions
from models.config import InputError
from models.layers import positions_2d, rope_2d
from models.networks import TransformerConfig, build_model
from pipeline.config import TrainConfig, sizes_of
from pipeline.data.loader import Loader
from pipeline.runs.setup import fit_data
from pipeline.training.config import GPUS, EngineConfig
from pipeline.training.engine import (
    BUCKET_ELEMENTS,
    LIVE_ELEMENTS,
    PERSISTENT_ELEMENTS,
    parameter_groups,
)
from pipeline.training.flops import ModelFlops
from pipeline.training.optimizers import muon_flops

GIB = 2**30
# Of a GPU's memory: the rest is CUDA's context, NCCL's buffers, kernels' workspaces and fragments.
USABLE = 0.9
Stage = Literal[0, 1, 2, 3]
Precision = Literal["fp32", "bf16"]
BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2}


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
    engine: EngineConfig,
    ranks: int,
    averages: int = 1,
    small: int = 0,
    by_muon: int = 0,
) -> StateBytes:
    """ZeRO (Rajbhandari 1910.02054, table 1) with our averages, fp32 accumulation and DeepSpeed's buckets.

    Of its `by_muon` elements Muon keeps one moment.
    """
    stage, precision = engine.zero_stage, planned_precision(engine)
    size = BYTES[precision]
    gradients = 4 / ranks if stage else size
    if stage == 1 and precision == "bf16":
        gradients = size + 4  # accumulated whole, beside the 16-bit ones of the step
    weights, bucket = float(num_parameters), 0
    if stage == 3:
        weights = small + num_parameters / ranks  # small ones whole, and their partitions too
        weights += num_parameters / (engine.hpz_partition_size or math.inf)
        bucket = min(BUCKET_ELEMENTS, num_parameters)
    # Two moments, the averages, and a master where the weight itself is none.
    states = num_parameters * (8 + 4 * averages + (4 if stage or precision == "bf16" else 0))
    states = (states - 4 * by_muon) / (ranks if stage else 1)
    buffers = float(bucket * BYTES[engine.reduce_precision])
    return StateBytes(weights * size, num_parameters * gradients, states, buffers)


def planned_precision(engine: EngineConfig) -> Precision:
    """`auto` is bf16 on every GPU in the table."""
    return "fp32" if engine.precision == "fp32" else "bf16"


def checkpoint_bytes(num_parameters: int, averages: int = 1, by_muon: int = 0) -> int:
    """Bytes of one checkpoint: masters, two moments (Muon's one) and the averages, fp32, in all ranks' files."""
    return num_parameters * 4 * (3 + averages) - 4 * by_muon


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

    positions_2d.cache_clear()  # remembered, but not across from fake to real
    rope_2d.cache_clear()
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
    positions_2d.cache_clear()
    rope_2d.cache_clear()
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
    # Bytes of a picture's members in shards; of text, those of its longest caption.
    stored: dict[str, float]


def prepared_data(config: TrainConfig) -> Workload:
    """The mean picture of the datasets that the config names; raises InputError where they do not fit it."""
    data, batch = config.data.model_copy(update={"grow": False}), config.training.global_batch
    loader = Loader(data, global_batch=batch, seed=config.seed)
    fit_data(config, loader)
    manifest, mixture = loader.manifest, loader.first.mixture
    trained = np.where(mixture.heldout, 0, mixture.sizes)
    area = (mixture.heights * mixture.widths * trained).sum() / trained.sum()
    side = round(math.sqrt(area) / manifest.codec.downscale)
    longest = [manifest.text.shape(group[0])[0] for group in manifest.text.tokens]
    tokens = sum(min(data.text_length or length, length) for length in longest)
    size = manifest.codec.downscale * side
    total = float(mixture.bytes.sum())
    return Workload(
        ", ".join(source.path for source in data.sources.values()),
        mixture.doubts(),
        round(loader.first.order.samples_per_epoch),
        total,
        sizes_of(manifest),
        Sample(side, side, tokens, total / int(mixture.sizes.sum())),
        {f"{n} ({m.dtype})": stored_bytes(manifest, n, size) for n, m in manifest.members.items()},
    )


def stored_bytes(manifest: Manifest, name: str, side: int) -> float:
    """Bytes that a member has in shards per square picture of `side` pixels; of text, those of its longest caption."""
    role, member = manifest.text.roles.get(name), manifest.members[name]
    shape = manifest.shape_in_bucket(name, side, side)
    longest = role.view.max_length if role else 0
    return np.dtype(member.stored).itemsize * math.prod(longest if n is None else n for n in shape)


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
    # Pixels are bytes, latents a mean and a std in float16, as text is.
    stored = {"moments": sizes["latent_channels"] * side**2 * (1.0 if downscale == 1 else 4.0)}
    stored |= {"text": 2.0 * tokens * sizes["text_dim"], "pooled": 2.0 * sizes["pooled_dim"]}
    # A header of 128 and a tar entry of 512 bytes per member, each padded to 512; captions are short.
    size = sum(stored.values()) + 5 * 1024
    where, sample = "assumed: none is there yet", Sample(side, side, tokens, size)
    return Workload(where, [], pictures, size * pictures, sizes, sample, stored)


class Collective(NamedTuple):
    """What each rank hands to torch.distributed in a step, in all calls of a kind among so many ranks."""

    kind: Literal["all_reduce", "reduce_scatter", "all_gather", "all_to_all"]
    dtype: Precision
    elements: float
    ranks: int

    @property
    def sent_bytes(self) -> float:
        """Bytes that a rank sends, but for all_to_all in a ring (1910.02054, section 7)."""
        others = self.ranks - 1
        passes = {"all_reduce": 2 * others / self.ranks, "all_gather": others}
        return self.elements * BYTES[self.dtype] * passes.get(self.kind, others / self.ranks)


@dataclass(frozen=True)
class Machines:
    gpus: int
    gpus_per_node: int
    gpu: str
    memory: float  # bytes per GPU
    mfu: float
    price: float | None  # a GPU-hour
    within: float  # GB/s that a GPU sends to others of its node
    between: float  # GB/s that a node sends to others

    @property
    def speed(self) -> float:
        """FLOP/s of a GPU."""
        return GPUS[self.gpu][0] * 1e12 * self.mfu

    def seconds(self, sent: list[Collective]) -> float:
        """Time of a step's collectives; a ring through several nodes is as slow as its slowest link."""
        all_links = min(self.within, self.between)
        return sum(
            c.sent_bytes / (self.within if c.ranks <= self.gpus_per_node else all_links) / 1e9
            for c in sent
        )


def collectives(
    engine: EngineConfig,
    num_parameters: int,
    small: int,
    ranks: int,
    micro_steps: int,
    checkpointing: bool,
) -> list[Collective]:
    """A step's, as DeepSpeed makes them (tests count them)."""
    weights, summed, stage = planned_precision(engine), engine.reduce_precision, engine.zero_stage
    if stage < 3:
        # Stage 2 divides gradients, so that it cannot add up micro-batches before it reduces them.
        times = micro_steps if stage == 2 else 1
        found = [Collective("all_reduce", summed, num_parameters * times, ranks)]
        if stage:
            found.append(Collective("all_gather", weights, num_parameters / ranks, ranks))
        return found
    large = num_parameters - small
    # Forward, backward, and the forward that checkpointing repeats; what is kept is gathered once.
    uses = 1 if num_parameters <= LIVE_ELEMENTS else 3 if checkpointing else 2
    again, group = uses * micro_steps - 1, engine.hpz_partition_size or ranks
    return [
        Collective("reduce_scatter", summed, num_parameters * micro_steps, ranks),
        Collective("all_gather", weights, (small + large) / ranks, ranks),
        Collective("all_gather", weights, large / group * again, group),
    ]


def muon_matrices(config: TrainConfig, network: nn.Module) -> list[torch.Size]:
    """Shapes of the matrices that Muon steps on, in the order in which ZeRO lays them out; none for AdamW."""
    groups = parameter_groups(network, 0.0, config.optimizer.kind == "muon")
    return [p.shape for group in groups if group["muon"] for p in group["params"]]


def muon_collectives(matrices: list[torch.Size], stage: Stage, ranks: int) -> list[Collective]:
    """Cut matrices go whole to one rank and their updates back; the mean over ranks (tests count it)."""
    sizes = np.array([shape.numel() for shape in matrices])
    if stage == 0 or not len(sizes):
        return []
    if stage < 3:
        # One flat tensor, cut in equal parts of an even number of elements.
        part, ends = 2 * -(-int(sizes.sum()) // (2 * ranks)), np.cumsum(sizes)
        sizes = sizes[(ends - sizes) // part != (ends - 1) // part]
    return [Collective("all_to_all", "bf16", 2 * float(sizes.sum()) / ranks, ranks)]


class Network:
    """A run's network as far as its cost depends on it, which is not built."""

    def __init__(self, config: TrainConfig, data: Workload):
        self.model, sample = config.model.with_sizes(data.sizes), data.sample
        with torch.device("meta"):
            network = build_model(self.model)
        self.num_parameters = sum(p.numel() for p in network.parameters())
        self.num_small, matrices = num_small(network), muon_matrices(config, network)
        self.matrices, self.by_muon = matrices, sum(shape.numel() for shape in matrices)
        counted = ModelFlops(self.model)
        self.picture_flops = counted.picture(sample.height, sample.width, sample.tokens)
        self.muon_flops = float(sum(map(muon_flops, matrices)))


def flops_per_step(config: TrainConfig) -> float:
    """FLOPs of a step over all ranks: the batch forward and backward, and Muon's."""
    network = Network(config, prepared_data(config))
    return config.training.global_batch * network.picture_flops + network.muon_flops


@dataclass(frozen=True)
class Fit:
    """One way to lay the run out: what a GPU holds, the largest micro-batch that fits, and what it sends."""

    stage: Stage
    checkpointing: bool
    state: StateBytes
    activations: float  # bytes per picture
    micro_batch: int  # 0: not even one picture
    sent: list[Collective]
    seconds: float  # per step, computing and sending, nothing hidden


def layouts(config: TrainConfig, network: Network, sample: Sample, machines: Machines) -> list[Fit]:
    """Every ZeRO stage that can train it, with and without gradient checkpointing."""
    gpus, share = machines.gpus, config.training.global_batch // machines.gpus
    divisors = [d for d in range(1, share + 1) if share % d == 0]
    precision = planned_precision(config.engine)
    averages, fits = len(config.ema.names()), []
    num_parameters, small = network.num_parameters, network.num_small
    muon_s = network.muon_flops / machines.speed
    for checkpointing in (False, True):
        activations = activation_bytes(network.model, sample, precision, checkpointing)
        # The repeated forward is a third of the arithmetic.
        computing = share * network.picture_flops / machines.speed * (4 / 3 if checkpointing else 1)
        for stage in (0, 1, 2, 3):
            engine = config.engine.model_copy(update={"zero_stage": stage})
            state = state_bytes(num_parameters, engine, gpus, averages, small, network.by_muon)
            room = USABLE * machines.memory - state.total
            # At stage 0, micro-batches would be summed in bf16.
            whole = stage == 0 and precision == "bf16"
            valid = divisors[-1:] if whole else divisors
            sizes = [d for d in valid if d * (activations + 2 * sample.bytes) <= room]
            micro_batch = max(sizes, default=0)
            steps = share // (micro_batch or 1)
            sent = collectives(engine, num_parameters, small, gpus, steps, checkpointing)
            sent += muon_collectives(network.matrices, stage, gpus)
            seconds = computing + machines.seconds(sent) + muon_s / (gpus if stage else 1)
            fits.append(Fit(stage, checkpointing, state, activations, micro_batch, sent, seconds))
    return fits


def best_layout(fits: list[Fit], share: int) -> Fit | None:
    """The fastest of those whose micro-batch is enough, else of those with the largest one; the plainer wins a tie."""
    most = max((f.micro_batch for f in fits), default=0)
    enough = [f for f in fits if 0 < min(share, 16, most) <= f.micro_batch]
    return min(enough, key=lambda f: f.seconds, default=None)


def memory_table(fits: list[Fit], best: Fit | None, gpu: str) -> Table:
    title = (
        f"GiB per {gpu}; the largest micro-batch that fits (at ZeRO 0 in bf16 the whole share alone may), and what each "
        "sends in a step with it"
    )
    table = Table(title=title, title_justify="left")
    for name in ("ZeRO", "checkpointing", "weights", "gradients", "optimizer + EMA", "buffers", "a picture", "micro-batch", "GB sent"):  # fmt: skip
        table.add_column(name, justify="right")
    for fit in fits:
        s = fit.state
        numbers = (s.weights, s.gradients, s.optimizer, s.buffers, fit.activations)
        table.add_row(
            str(fit.stage),
            "yes" if fit.checkpointing else "no",
            *(f"{n / GIB:.3f}" for n in numbers),
            str(fit.micro_batch or "does not fit"),
            f"{sum(part.sent_bytes for part in fit.sent) / 1e9:.2f}",
            style="bold green" if fit is best else None,
        )
    return table


def report(config: TrainConfig, data: Workload, machines: Machines, console: Console) -> Fit | None:
    """Print the plan; returns the layout it proposes."""
    network = Network(config, data)
    num_parameters, flops = network.num_parameters, network.picture_flops
    batch, sample = config.training.global_batch, data.sample
    steps = config.training.num_steps
    precision = planned_precision(config.engine)
    rate = machines.gpus * machines.speed / flops
    fits = layouts(config, network, sample, machines)
    best = best_layout(fits, batch // machines.gpus)
    hours = config.training.images / rate / 3600
    nodes = -(-machines.gpus // machines.gpus_per_node)
    chosen = best or fits[-1]
    sent = sum(part.sent_bytes for part in chosen.sent)
    saved = checkpoint_bytes(num_parameters, len(config.ema.names()), network.by_muon)
    kept = config.checkpoint.keep
    if config.checkpoint.keep_every_steps:
        kept += steps // config.checkpoint.keep_every_steps
    lines = [
        ("data", f"{data.origin}: {data.num_pictures:,} pictures, {data.total_bytes / GIB:,.2f} GiB, {sample.bytes / 1024:.1f} KiB each"),
        ("of these", ", ".join(f"{name} {size / 1024:,.1f} KiB" for name, size in data.stored.items()) + ", text of its longest captions"),
        ("model", f"{config.model.kind} {getattr(config.model, 'size', '')}: {num_parameters / 1e6:,.1f} M parameters"),
        ("a picture", f"latents {sample.height} x {sample.width}, {sample.tokens} text tokens, {flops / 1e9:,.1f} GFLOPs forward and backward"),
        ("steps", f"{steps:,} of {batch} pictures; {config.training.images / max(data.num_pictures, 1):.2f} epochs"),
        ("speed", f"{rate:,.0f} pictures/s on {machines.gpus} x {machines.gpu} at a model FLOPs utilisation of {machines.mfu:.0%} ({precision}); {batch / rate:.3f} s per step"),
        *([("muon", f"{network.muon_flops / (batch * flops):.2%} more FLOPs, {network.by_muon / 1e6:,.1f} M parameters; at ZeRO 0 on every GPU, else shared")] if network.by_muon else []),
        ("time", f"{duration(3600 * hours)}, over all GPUs {duration(3600 * hours * machines.gpus)}" + (f", {hours * machines.gpus * machines.price:,.0f} at {machines.price:g} per GPU-hour" if machines.price else "")),
        ("loader", f"{rate * sample.bytes / nodes / 1e6:,.0f} MB/s per node ({nodes}); `flowmill doctor --folder` measures the disk"),
        ("communication", f"{sent / 1e9:.2f} GB per GPU and step at ZeRO {chosen.stage}, gradients summed in {config.engine.reduce_precision}: {machines.seconds(chosen.sent):.3f} s at {machines.within:g} GB/s per GPU within nodes and {machines.between:g} GB/s per node between them, less what backward hides"),
        ("a look", f"at prompts and held-out samples, which ranks share: {num_parameters * (4 if precision == 'fp32' else 2) / GIB:.2f} GiB more per GPU for as long as it takes"),
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
