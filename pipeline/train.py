"""Train a model on prepared shards: `python -m pipeline.train CONFIG.yaml [section.key=value ...]`.

Run the same command again to resume; on several GPUs `torchrun --nproc-per-node 8 -m pipeline.train ...`.
"""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import nn

from models import build_model
from models.config import InputError, differences, flatten, run_command
from models.files import write_text
from pipeline import checkpoint, distributed
from pipeline.config import (
    RESULTS,
    TrainConfig,
    dump_config,
    load_run_config,
    sizes_of,
)
from pipeline.data import Batch, Loader
from pipeline.ema import WithEMA, ema_decays
from pipeline.engine import (
    EngineConfig,
    build_engine,
    check_engine,
    grad_norm,
    lr_schedule,
    micro_batch_size,
    native_precision,
    set_lr,
)
from pipeline.forward import Forward
from pipeline.heldout import by_noise_level
from pipeline.monitor import LossMeter, Monitor, SampleLog
from pipeline.norms import BlockNorms
from pipeline.objective import Objective
from pipeline.pictures import Painter, encoder_folder, grid, largest_bucket, load_encoders
from pipeline.pieces import full_weights
from pipeline.posthoc_ema import store_snapshots
from pipeline.rejection import Rejection
from pipeline.snapshots import SNAPSHOTS, check_fits
from pipeline.stages import finished, load_stages, load_start
from pipeline.watchdog import Watchdog


@dataclass(frozen=True)
class Plan:
    """A config that fits its dataset: the model's sizes filled in, and the loader over the data."""

    config: TrainConfig
    loader: Loader
    micro_batch: int

    @property
    def run(self) -> Path:
        return Path(self.config.run)


def make_plan(config: TrainConfig) -> Plan:
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
    config = config.model_copy(update={"model": model, "engine": resolve_precision(config)})
    micro_steps = config.training.global_batch // micro_batch // distributed.world_size()
    check_engine(config.engine, config.optimizer, micro_steps)
    where = ", ".join(source.path for source in config.data.sources.values())
    check_fits(manifest, where, model)
    if config.encoders.vae is not None:
        encoder_folder(
            manifest.codec.path, config.encoders.vae, manifest.codec.weights_sha256, "encoders.vae"
        )
    for name, folder in config.encoders.text.items():
        if name not in manifest.text_encoders:
            raise InputError(
                f"encoders.text.{name}: got a name that the dataset lacks, expected one of {list(manifest.text_encoders)}"
            )
        record = manifest.text_encoders[name]
        encoder_folder(record.path, folder, record.weights_sha256, f"encoders.text.{name}")
    return Plan(config, loader, micro_batch)


def resolve_precision(config: TrainConfig) -> EngineConfig:
    """`precision: auto` made one of the two: the run's if it has begun, else what this machine is good at."""
    engine, saved = config.engine, Path(config.run) / "config.yaml"
    if engine.precision != "auto":
        return engine
    begun = load_run_config(saved.parent).engine.precision if saved.is_file() else None
    return engine.model_copy(update={"precision": begun or native_precision()})


def check_run(plan: Plan, override: bool) -> None:
    """Check that the run's folder, if there is one, holds a run of the same config; raises InputError."""
    path = plan.run / "config.yaml"
    if path.is_file():
        changed = differences(load_run_config(plan.run), plan.config)
        unsafe = {k: v for k, v in changed.items() if k.split(".")[0] in RESULTS}
        lines = [f"  {key}: saved {old!r}, given {new!r}" for key, (old, new) in changed.items()]
        if unsafe and not override:
            raise InputError(
                f"{plan.run}: was trained with another config:\n"
                + "\n".join(lines)
                + "\nRemedy: undo "
                "the change, choose another run=FOLDER, or pass --override to go on with the new values."
            )
        if lines:
            distributed.say("config changed since this run's start:\n" + "\n".join(lines))
        if "training.global_batch" in changed:
            old, new = changed["training.global_batch"]
            lr, ratio = plan.config.optimizer.lr, new / old
            distributed.say(
                f"training.global_batch is {ratio:g} times what it was, and optimizer.lr {lr:g} as given: nothing "
                f"rescales it. In proportion it would be {lr * ratio:.3g}, by the square root {lr * ratio**0.5:.3g}"
            )


def record_run(plan: Plan) -> None:
    """Write down config, code and environment of a run that begins or goes on."""
    path = plan.run / "config.yaml"
    if distributed.is_main():
        plan.run.mkdir(parents=True, exist_ok=True)
        if not path.is_file():
            (plan.run / "git.txt").write_text(_git_state())
            (plan.run / "environment.txt").write_text(_environment())
        write_text(path, dump_config(plan.config))


def _git_state() -> str:
    """The code's commit and what differs from it, as far as git knows."""
    here = Path(__file__).parent.parent
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


def look(
    plan: Plan,
    painter: Painter | None,
    heldout: Batch | None,
    engine: Any,
    optimizer: WithEMA,
    objective: Objective,
    step: int,
    monitor: Monitor,
) -> None:
    """Held-out loss, raw and EMA, and the fixed prompts at the fixed noise. Collective: rank 0 works."""
    for which in ("ema", "raw") if heldout is not None else ("ema",):
        weights = full_weights(engine, optimizer, which)
        if not distributed.is_main():
            continue
        network = network_for_sampling(plan.config, weights, monitor.device)
        if heldout is not None:
            codec = plan.loader.manifest.codec
            values = by_noise_level(network, objective, codec, heldout, plan.micro_batch)
            monitor.scalars(step, {f"heldout_{which}/{name}": v for name, v in values.items()})
        if painter is not None and which == "ema":
            sheet = draw_sheet(plan, painter, network, objective, step)
            monitor.pictures(step, "samples/ema", torch.from_numpy(sheet).permute(2, 0, 1))


def draw_sheet(
    plan: Plan, painter: Painter, network: nn.Module, objective: Objective, step: int
) -> np.ndarray:
    """The prompts' pictures as one, uint8 (H, W, 3), also in the run's samples."""
    size = largest_bucket(plan.loader.manifest)
    pictures = painter.draw(network, objective, plan.config.sampler, size)
    sheet = grid(pictures, painter.prompts, columns=5)
    folder = plan.run / "samples"
    folder.mkdir(exist_ok=True)
    sheet.save(folder / f"step_{step:08d}.png")
    return np.array(sheet)


def network_for_sampling(config: TrainConfig, weights: dict, device: torch.device) -> nn.Module:
    """A network with these weights beside the one in training; bf16 on a GPU if it trains in bf16."""
    network = build_model(config.model)
    network.load_state_dict(weights)
    half = config.engine.precision == "bf16" and device.type == "cuda"
    return network.to(device, torch.bfloat16 if half else torch.float32).eval()


def train(config: TrainConfig, override: bool = False) -> None:
    """One run, from wherever it stands to `training.images` pictures or a signal."""
    train_stages([config], override)


def train_stages(stages: list[TrainConfig], override: bool = False) -> None:
    """Runs one after another, each from wherever it stands; a signal ends all."""
    for config in stages[1:]:
        make_plan(config)  # what is wrong with a later stage is found now
    for config in stages:
        if len(stages) > 1 and finished(config):
            distributed.say(f"{config.run}: finished before")
            continue
        for _ in steps(config, override):
            pass
        if not finished(config):
            break
    distributed.stop()


def steps(config: TrainConfig, override: bool = False) -> Iterator[int]:
    """A run step by step: yields each step's number once all that belongs to it is done."""
    # --- setup: all that can fail fails here
    plan = make_plan(config)
    check_run(plan, override)
    config = plan.config
    device = distributed.start(config.engine.timeout_s)
    silence_s, stuck_s = config.engine.heartbeat_timeout_s, config.engine.timeout_s
    with distributed.StopSignal() as stop_signal, Watchdog(silence_s, stuck_s) as watchdog:
        yield from run_steps(plan, device, stop_signal, watchdog)
        distributed.barrier()


def run_steps(
    plan: Plan, device: torch.device, stop_signal: distributed.StopSignal, watchdog: Watchdog
) -> Iterator[int]:
    """From where the run stands to its end or a signal."""
    config, run, loader, manifest = plan.config, plan.run, plan.loader, plan.loader.manifest
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(config.engine.cpu_threads or max(1, (os.cpu_count() or 1) // ranks_here))
    exchange = distributed.Exchange()
    global_batch = config.training.global_batch

    # --- model, optimizer, where we left off
    objective = Objective(config.objective)
    torch.manual_seed(config.seed)  # the initial weights, the same on all ranks
    model = build_model(config.model)
    if config.start_from and not checkpoint.candidates(run):
        distributed.say(
            f"{run}: begins with the {config.start_from.weights} weights of {config.start_from.run}"
        )
        load_start(model, config.start_from)
    elif config.model.init_from and not checkpoint.candidates(run):
        from models.exchange import load_weights  # and diffusers with it

        distributed.say(f"{run}: begins with the weights of {config.model.init_from}")
        load_weights(model, config.model.init_from)
    num_parameters = sum(p.numel() for p in model.parameters())
    painter = None
    if config.monitor.prompts and distributed.is_main():
        # Only the painter keeps what is loaded here, which is the codec alone.
        encoders = config.encoders.vae, config.encoders.text
        painter = Painter(
            load_encoders(manifest, *encoders, device),
            config.monitor.prompts,
            config.model.num_classes,
        )
    engine, optimizer = build_engine(model, config.engine, config.optimizer, global_batch)
    dropout = config.training.caption_dropout
    forward = Forward(engine, objective, loader, config.model, dropout, device)
    lr_of = lr_schedule(config.optimizer, global_batch, config.training.num_steps)
    saver = checkpoint.Saver(run / checkpoint.CHECKPOINTS, config.checkpoint)
    rejection = Rejection(config.rejection, run, engine, optimizer)
    record = checkpoint.restore(run, engine, optimizer)
    record_run(plan)
    start, ahead = 0, 0  # of the steps that as many pictures would be at today's global batch
    if record:
        start, ahead = record["step"], record["images_seen"] // global_batch - record["step"]
        rejection.load(record["rejection"])
    num_steps = config.training.num_steps - ahead
    monitor = Monitor(run, config.monitor, start, num_steps, global_batch, device)
    monitor.images_before = ahead * global_batch
    monitor.measure_flops(config.model, config.engine.precision)
    samples = config.monitor.heldout_samples
    heldout = loader.heldout_batch(samples) if samples else None
    heldout = None if heldout is None else heldout.to(device)
    norms = BlockNorms(engine, device) if config.monitor.block_norms else None
    looking = bool(config.monitor.prompts) or heldout is not None
    meter = LossMeter(device)
    distributed.say(
        f"{run}: {config.model.kind}, {num_parameters / 1e6:.1f} M parameters, {manifest.counts.kept:,} pictures, "
        + (f"resuming at step {start} of {num_steps}" if start else f"{num_steps} steps")
    )
    if not start:
        monitor.describe(
            dump_config(config), flatten(config.model_dump(mode="json")), num_parameters
        )
        if looking:
            look(plan, painter, heldout, engine, optimizer, objective, 0, monitor)
    monitor.restart_clock(start)
    sample_log = SampleLog(run) if config.monitor.log_samples else None
    saved, step = start, start
    batches = loader.batches(start + ahead)

    while step < num_steps:
        # --- batch, noise, loss, step
        taken = step + ahead - rejection.total  # a rejected step moves neither schedule
        lr = lr_of(taken)
        set_lr(optimizer, lr)
        optimizer.decays = ema_decays(config.ema, taken * global_batch, global_batch)
        logged = (step + 1) % config.monitor.every_steps == 0 or step + 1 == num_steps
        optimizer.watch = norms if logged else None
        monitor.mark("other")
        wait_s = loader.wait_s
        batch = next(batches)
        monitor.data_wait_s += loader.wait_s - wait_s
        monitor.mark("data")
        if sample_log is not None:
            sample_log.write(batch)
        latent_size = (batch.moments.shape[-2], batch.moments.shape[-1])
        draws = forward.draw(step, latent_size)
        micro_batches, done = batch.split(plan.micro_batch), []
        for number, micro_batch in enumerate(micro_batches, 1):
            terms = forward(micro_batch, draws, taken * global_batch)
            done.append(terms)
            monitor.mark("forward")
            engine.backward(terms.total)
            monitor.mark("backward")
            if number == len(micro_batches):
                rejection.judge(torch.cat([part.named["loss"] for part in done]).mean())
            engine.step()
            monitor.mark("optimizer")
        sample_losses = torch.cat([part.named["loss"] for part in done])
        accepted = rejection.settle(step, batch, loader.era_at(batch.step).snapshot, sample_losses)
        for part in done if accepted else ():
            meter.add(part.t, part.named)
        step += 1
        text_length = 0 if batch.text_emb is None else batch.text_emb.shape[1]
        monitor.advance(step, draws.t, latent_size, text_length)
        watchdog.alive(step)
        stopping, saving = exchange.any(step, stop_signal.name is not None, saver.busy)
        if not saving:
            saver.finish()
        last = stopping or step == num_steps

        # --- log, draw, save
        if step % config.monitor.every_steps == 0 or last:
            values = meter.collect()
            if config.data.on_corrupt == "skip":
                skipped = distributed.gather_objects(loader.skipped.samples)
                values["data/skipped_samples"] = float(sum(skipped))
            values["optimizer/lr"] = lr
            values |= {f"optimizer/{name}_decay": d for name, d in optimizer.decays.items()}
            values["optimizer/rejected_steps"] = float(rejection.total)
            if (norm := grad_norm(engine, optimizer)) is not None:
                values["optimizer/grad_norm"] = norm
            if accepted and norms is not None and optimizer.watch is not None:
                values |= norms.collect(norm)
            monitor.log(step, values, objective)
        if looking and (step % config.monitor.sample_every_steps == 0 or step == num_steps):
            look(plan, painter, heldout, engine, optimizer, objective, step, monitor)
            monitor.restart_clock(step)
        if config.ema.snapshot_images and (
            step % max(1, config.ema.snapshot_images // global_batch) == 0 or step == num_steps
        ):
            images = (step + ahead - rejection.total) * global_batch
            store_snapshots(run, config.ema, step, images, engine, optimizer)
            monitor.restart_clock(step)
        if step % config.checkpoint.every_steps == 0 or last:
            images = (step + ahead) * global_batch
            state = {"images_seen": images, "rejection": rejection.state()}
            saver.save(step, engine, optimizer, state)
            saved = step
            monitor.restart_clock(step)
        yield step
        if stopping:
            break

    # --- leave
    monitor.close()
    loader.close()
    saver.finish()
    if saver.failed:
        sys.exit(f"{run}: step {step} could not be saved")
    if step == num_steps and saved == start:
        distributed.say(f"{run}: already at step {num_steps}; raise training.images to go on")
    elif step < num_steps:
        distributed.say(
            f"stopped by {stop_signal.name or 'a signal to another rank'} at step {step}, saved; run again to resume"
        )


def describe(plan: Plan) -> str:
    """What a run will be, for --dry-run."""
    config, loader = plan.config, plan.loader
    with torch.device("meta"):
        num_parameters = sum(p.numel() for p in build_model(config.model).parameters())
    steps, per_epoch = config.training.num_steps, loader.steps_per_epoch(0)
    accumulate = config.training.global_batch // (plan.micro_batch * distributed.world_size())
    return "\n".join(
        [
            f"run          {plan.run}" + (" (resumes)" if checkpoint.candidates(plan.run) else ""),
            f"data         {loader.manifest.counts.kept:,} pictures, {per_epoch} steps an epoch",
            f"model        {config.model.kind}, {num_parameters / 1e6:.1f} M parameters",
            f"steps        {steps:,} ({steps / per_epoch:.1f} epochs) of {config.training.global_batch} pictures",
            f"ranks        {distributed.world_size()} x {plan.micro_batch} pictures x {accumulate} accumulated, "
            f"ZeRO {config.engine.zero_stage}, {config.engine.precision}",
        ]
    )


def main(
    config: Annotated[Path, typer.Argument(help="YAML file of the run")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check and describe; write nothing")
    ] = False,
    override: Annotated[
        bool, typer.Option("--override", help="resume with changed values that change results")
    ] = False,
) -> None:
    """Train a model on a prepared dataset; run again to resume."""
    stages = load_stages(config, overrides or [])
    if dry_run:
        distributed.say("\n\n".join(describe(make_plan(stage)) for stage in stages))
    else:
        train_stages(stages, override)


if __name__ == "__main__":
    run_command(main)
