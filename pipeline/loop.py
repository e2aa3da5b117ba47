"""The training loop: one page, and how a command runs it."""

import os
import sys
from collections.abc import Iterator

import torch

from models.numerics import be_deterministic
from pipeline import distributed
from pipeline.config import TrainConfig
from pipeline.distributed.sole_writer import SoleWriter
from pipeline.distributed.stop_signal import StopSignal
from pipeline.distributed.watchdog import Watchdog
from pipeline.inference.preview import Preview
from pipeline.objectives.objective import Objective
from pipeline.runs.setup import Run, check_run, describe, fit_run
from pipeline.runs.start import finished
from pipeline.training import checkpoint
from pipeline.training.clock import Clock
from pipeline.training.engine import build_engine
from pipeline.training.forward import Forward
from pipeline.training.monitor import LossMeter, Monitor
from pipeline.training.rejection import Rejection


def train(run: Run, stop: StopSignal, watchdog: Watchdog, writer: SoleWriter) -> Iterator[int]:
    """One run, from where it stands to its end or a signal; yields each step's number."""
    # --- what the run is made of: all that can fail fails here
    config, clock, objective = run.config, Clock(run.config), Objective(run.config.objective)
    preview = Preview(run, objective, stop)
    model, batch = run.build_model(), clock.global_batch
    engine, optimizer = build_engine(model, config.engine, config.optimizer, batch)
    device, dropout = distributed.own_device(), config.training.caption_dropout
    forward = Forward(engine, objective, run.loader, config.model, dropout, device)
    rejection, meter = Rejection(config, run.loader, optimizer), LossMeter(device)
    parts = {"clock": clock, "rejection": rejection, "preview": preview, "meter": meter}
    checkpoint.restore(run.folder, engine, optimizer, **parts)
    saver = checkpoint.Saver(run.folder / checkpoint.CHECKPOINTS, config.checkpoint, writer.check)
    run.record()
    monitor = Monitor(config, clock, meter, run.loader, engine)
    announce(run, clock, monitor)
    if preview.due(clock):
        preview.show(engine, optimizer, monitor, clock.step)
    batches = run.loader.batches(clock.next_batch, clock.step)
    monitor.restart()

    while not clock.finished:
        # --- batch, noise, loss, step
        batch = monitor.timed_next(batches)
        draws = forward.draw(clock.step, batch.latent_size)
        optimizer.prepare(clock.lr(), clock.ema_decays(), monitor.norms_if_due())
        micro_batches, terms = batch.split(run.micro_batch), []
        for micro_batch in micro_batches:
            terms.append(forward(micro_batch, draws, clock.images_learned))
            monitor.mark("forward")
            last = len(terms) == len(micro_batches)
            engine.backward(rejection.judge(terms) if last else terms[-1].total)
            monitor.mark("backward")
            engine.step()
            monitor.mark("optimizer")
        accepted = rejection.settle(clock.step, batch, terms)
        clock.advance(accepted)
        monitor.count(batch, terms, accepted)
        watchdog.alive(clock.step)

        # --- log, draw, save
        asked, looks = stop.name is not None or writer.lost, preview.due(clock)
        stopping, writing = monitor.exchange.any(clock.step, asked, saver.busy, now=looks)
        if not writing:
            saver.finish()
        if clock.due(config.monitor.every_steps):
            monitor.log(engine, optimizer, rejection.total)
        with monitor.paused():
            if looks and not stopping:
                preview.show(engine, optimizer, monitor, clock.step)
            if clock.snapshot_due:
                writer.check()
                checkpoint.store_snapshots(run.folder, config.ema, clock, engine, optimizer)
            if clock.due(config.checkpoint.every_steps) or stopping:
                saver.save(clock.step, engine, optimizer, {n: p.state() for n, p in parts.items()})
        yield clock.step
        if stopping:
            break

    leave(run, clock, saver, stop, monitor)


def announce(run: Run, clock: Clock, monitor: Monitor) -> None:
    """Say what begins or resumes, now that all is set up."""
    monitor.ledger.mark("start_up")
    distributed.say(describe(run))
    if clock.step:
        distributed.say(f"{run.folder}: resuming at step {clock.step} of {clock.num_steps}")
    else:
        monitor.describe(run.num_parameters)


def leave(
    run: Run, clock: Clock, saver: checkpoint.Saver, stop: StopSignal, monitor: Monitor
) -> None:
    """Wait for the last save and say how the run ended; exit 1 if not saved. Collective."""
    run.loader.close()
    saver.finish()
    monitor.close()
    if saver.failed:
        sys.exit(f"{run.folder}: step {clock.step} could not be saved")
    if not clock.finished:
        distributed.say(
            f"stopped by {stop.name or 'a signal to another rank'} at step {clock.step}, saved; run again to resume"
        )
    elif clock.step == clock.start_step:
        already = f"already at step {clock.step}; raise training.images to go on"
        distributed.say(f"{run.folder}: {already}")
    else:
        distributed.say(f'{run.folder}: done. Next: flowmill sample {run.folder} --prompt "..."')


def steps(config: TrainConfig, override: bool = False) -> Iterator[int]:
    """Train one run; yields each step's number once all that belongs to the step is done."""
    if config.engine.deterministic:
        be_deterministic()
    run = fit_run(config)
    check_run(run, override)
    engine = run.config.engine
    distributed.start(engine.timeout_s)
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(engine.cpu_threads or max(1, (os.cpu_count() or 1) // ranks_here))
    watchdog = Watchdog(engine.heartbeat_timeout_s, engine.timeout_s)
    with StopSignal() as stop, watchdog, SoleWriter(run.folder) as writer:
        yield from train(run, stop, watchdog, writer)
        distributed.barrier()


def train_all(configs: list[TrainConfig], override: bool = False) -> None:
    """Train runs one after another, each from where it stands; a signal ends all of them."""
    # What is wrong with a later stage is found before the first one begins.
    for config in configs[1:]:
        fit_run(config)
    for config in configs:
        if len(configs) > 1 and finished(config):
            distributed.say(f"{config.run}: finished before")
            continue
        for _ in steps(config, override):
            pass
        if not finished(config):
            break
    distributed.stop()
