"""What a GPU is asked in its first half hour: four calls, each with a table and JSON.

    python -m tests.benchmarks.gpu runs|waits|bits|memory [--json FILE] [--tiny]

    runs    8 minutes   the doctor, and `pytest -m gpu` by test
    waits   9 minutes   what waits for the GPU; pictures/s and MFU, real and synthetic data, compiled and eager
    bits    6 minutes   the same steps twice and resumed, by default and deterministic; the VAE's TF32
    memory  6 minutes   the peak beside the plan's; seconds of a look and of a save

`--tiny` runs the same on small networks, on a CPU too. Whoever has a GPU for ten minutes gets each call's figures.
"""

import itertools
import json
import subprocess
import sys
import tempfile
import time
import warnings
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from models.command import run_command
from models.config import InputError, parse_config
from models.networks import build_model
from pipeline import distributed
from pipeline.config import TrainConfig
from pipeline.distributed.sole_writer import SoleWriter
from pipeline.distributed.stop_signal import StopSignal
from pipeline.distributed.watchdog import Watchdog
from pipeline.loop import train
from pipeline.runs.planning import Sample, activation_bytes, num_small, state_bytes
from pipeline.runs.setup import fit_run
from pipeline.training.flops import ModelFlops
from pipeline.training.monitor import peak_memory
from tests.shard_factory import Kind, make_dataset
from tests.train_factory import unlike

TEXT = (120, 768)
WARM, STEPS = 8, 32
Figures = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A network, its pictures' side, and how many a GPU takes at once."""

    model: dict[str, Any]
    side: int
    batch: int


CASES = {
    "DiT-XL/2 256": Case({"kind": "dit", "size": "XL"}, 256, 128),
    # The width of two billion parameters in 24 blocks; a third of them leaves room for any card.
    "MMDiT 2B/3 512": Case({"kind": "mmdit", "size": "sd3", "depth": 8}, 512, 32),
}
TINY_CASES = {
    "DiT debug": Case({"kind": "dit", "size": "debug"}, 32, 4),
    "MMDiT debug": Case({"kind": "mmdit", "size": "debug"}, 32, 4),
}


@dataclass(frozen=True)
class Bench:
    """Where it runs, and how large."""

    folder: Path
    tiny: bool

    @property
    def device(self) -> torch.device:
        return distributed.own_device()

    @property
    def precision(self) -> str:
        return "bf16" if self.device.type == "cuda" else "fp32"

    @property
    def cases(self) -> dict[str, Case]:
        return TINY_CASES if self.tiny else CASES

    def config(self, name: str, case: Case, **more: Any) -> TrainConfig:
        """A run of the case on shards that are made once; `more` by section."""
        data = self.folder / f"data_{case.side}"
        if not data.exists():
            kind = Kind(encoders={"t5": TEXT}, channels=4, ragged=False)
            sizes = [((case.side, case.side), 4 * case.batch)]
            make_dataset(data, sizes, kind, heldout=[((case.side, case.side), case.batch)])
        sections: dict[str, dict[str, Any]] = {
            "data": {"path": str(data), "verify": "size"},
            "model": case.model,
            "training": {"images": 10**9, "global_batch": case.batch},
            "engine": {"precision": self.precision},
            "checkpoint": {"every_steps": 10**9},
            "monitor": {"every_steps": 10**6, "heldout_samples": 0, "block_norms": False},
        }
        for section, values in more.items():
            sections[section] |= values
        run = f"{case.model['kind']}_{name}"
        return parse_config(TrainConfig, sections | {"run": str(self.folder / run)}, run)


def steps_of(config: TrainConfig, synthetic: bool = False) -> Iterator[int]:
    """The trainer's own loop; synthetic: on one batch again and again, so that nothing is read."""
    run = fit_run(config)
    if synthetic:
        first = next(run.loader.batches(0))
        same = lambda start, _: (replace(first, step=n) for n in itertools.count(start))  # noqa: E731
        run.loader.batches = same  # pyright: ignore[reportAttributeAccessIssue]
    watchdog = Watchdog(config.engine.heartbeat_timeout_s, config.engine.timeout_s)
    with StopSignal() as stop, watchdog, SoleWriter(run.folder) as writer:
        yield from train(run, stop, watchdog, writer)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_per_step(steps: Iterator[int], device: torch.device, count: int = STEPS) -> float:
    for _ in range(WARM):
        next(steps)
    synchronize(device)
    begun = time.perf_counter()
    for _ in range(count):
        next(steps)
    synchronize(device)
    return (time.perf_counter() - begun) / count


def product_ceiling(bench: Bench) -> float:
    """FLOP/s of a large matrix product here, the best of five."""
    size = 8192 if bench.device.type == "cuda" else 512
    dtype = torch.bfloat16 if bench.precision == "bf16" else torch.float32
    a, times = torch.randn(size, size, device=bench.device, dtype=dtype), []
    for _ in range(5):
        synchronize(bench.device)
        begun = time.perf_counter()
        for _ in range(4):
            torch.mm(a, a)
        synchronize(bench.device)
        times.append((time.perf_counter() - begun) / 4)
    return 2 * size**3 / min(times)


# --- the four calls ---------------------------------------------------------------------------------


def runs(bench: Bench) -> tuple[Figures, Table]:
    """The doctor's words, and how each test marked gpu ended."""
    report = bench.folder / "report.xml"
    module = [sys.executable, "-m"]
    subprocess.run([*module, "pipeline.doctor", "--folder", str(bench.folder), "--need-gib", "1"])
    tests = ["tests/test_attention.py"] if bench.tiny else ["tests"]
    options = ["-q", "-n", "0", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]
    subprocess.run([*module, "pytest", *options, *tests])
    figures, table = Figures(), Table("test", "ended", "seconds", title="pytest -m gpu")
    for case in ElementTree.parse(report).iter("testcase"):
        ends = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        name, ended = f"{case.get('classname')}::{case.get('name')}", (ends or ["passed"])[0]
        figures[name] = {"ended": ended, "seconds": float(case.get("time", 0))}
        table.add_row(name, ended, case.get("time"))
    return figures, table


def waits(bench: Bench) -> tuple[Figures, Table]:
    """Speed of each case, and how often a plain step waits for the GPU, by line."""
    ceiling, figures = product_ceiling(bench), Figures()
    columns = ("network", "blocks", "data", "pictures/s", "MFU of the ceiling", "idle")
    table = Table(
        *columns, title=f"{torch.get_num_threads()} threads, {ceiling / 1e12:.1f} TFLOP/s"
    )
    for name, case in bench.cases.items():
        for compiled, synthetic in itertools.product((False, True), (False, True)):
            config = bench.config(f"{compiled}_{synthetic}", case, engine={"compile": compiled})
            steps = steps_of(config, synthetic)
            rate = case.batch / seconds_per_step(steps, bench.device)
            model = fit_run(config).config.model
            flops = ModelFlops(model).picture(case.side // 8, case.side // 8, TEXT[0])
            kinds = "compiled" if compiled else "eager", "synthetic" if synthetic else "real"
            idle = idle_share(steps, bench.device)
            key = " ".join((name, *kinds))
            figures[key] = {"pictures_per_s": rate, "mfu": rate * flops / ceiling, "idle": idle}
            if not compiled and not synthetic:
                figures[f"{name} syncs"] = syncs(steps, bench.device)
            steps.close()  # pyright: ignore[reportAttributeAccessIssue]
            cells = f"{rate:.1f}", f"{rate * flops / ceiling:.3f}", f"{idle:.3f}"
            table.add_row(name, *kinds, *cells)
    return figures | {"product_flops": ceiling}, table


def idle_share(steps: Iterator[int], device: torch.device) -> float:
    """Share of five steps in which no kernel runs; 0 on the CPU."""
    if device.type != "cuda":
        next(steps)
        return 0.0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        begun = time.perf_counter()
        for _ in range(5):
            next(steps)
        synchronize(device)
        elapsed = time.perf_counter() - begun
    busy = sum(event.self_device_time_total for event in profile.key_averages()) / 1e6
    return max(0.0, 1 - busy / elapsed)


def syncs(steps: Iterator[int], device: torch.device) -> dict[str, float]:
    """Waits for the GPU per step, by the line that causes them."""
    if device.type != "cuda":
        return {}
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(10):
            next(steps)
    torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{w.filename}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
    return {place: count / 10 for place, count in places.most_common()}


def bits(bench: Bench) -> tuple[Figures, Table]:
    """20 steps twice, and once resumed in the middle: states that differ in a bit, and milliseconds."""
    figures = Figures()
    table = Table("network", "deterministic", "twice", "resumed", "ms per step", title="bits")
    for name, case in bench.cases.items():
        for deterministic in (False, True):
            seconds, found = [], []
            for attempt, breaks in enumerate(((20,), (20,), (10, 20))):
                for images in breaks:
                    config = bench.config(
                        f"{deterministic}_{attempt}",
                        case,
                        training={"images": images * case.batch},
                        engine={"deterministic": deterministic},
                        checkpoint={"every_steps": 10},
                        monitor={"every_steps": 1},
                    )
                    begun = time.perf_counter()
                    number = sum(1 for _ in steps_of(config))
                    seconds.append((time.perf_counter() - begun) / number)
                found.append(Path(config.run))
            wrong = [len(unlike(other, found[0], 20)) for other in found[1:]]
            key = f"{name} {'deterministic' if deterministic else 'default'}"
            figures[key] = {"twice": wrong[0], "resumed": wrong[1], "s_per_step": min(seconds)}
            cells = (str(deterministic), *map(str, wrong), f"{1000 * min(seconds):.1f}")
            table.add_row(name, *cells)
    figures["vae"] = vae_errors(bench)
    for dtype, error in figures["vae"].items():
        table.add_row("VAE, moments", dtype, f"{error:.2e} from fp32 on the CPU")
    return figures, table


def vae_errors(bench: Bench) -> dict[str, float]:
    """Largest error of the VAE's moments against fp32 on the CPU, by dtype, over the largest moment."""
    from models.vae import LatentCodec
    from tests.test_vae import save_kl

    folder = save_kl(bench.folder / "vae")
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (4, 3, 256, 256), generator=generator, dtype=torch.uint8)
    whole = LatentCodec(folder).encode_moments(pictures)
    errors = {}
    for dtype in ("fp32", "tf32", "bf16"):
        moments = LatentCodec(folder, dtype, bench.device).encode_moments(pictures).cpu()
        errors[dtype] = float((moments - whole).abs().max() / whole.abs().max())
    return errors


def memory(bench: Bench) -> tuple[Figures, Table]:
    """The peak of each case beside the plan's, and seconds of a look and of a save beyond a plain step."""
    figures = Figures()
    columns = ("network", "peak GiB", "plan GiB", "over plan", "look s", "save s")
    table = Table(*columns, title="memory and stalls")
    for name, case in bench.cases.items():
        monitor = {"every_steps": 10**6, "sample_every_steps": 12, "heldout_samples": case.batch}
        config = bench.config("memory", case, monitor=monitor, checkpoint={"every_steps": 15})
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        model = fit_run(config).config.model
        times = {}
        for number in (steps := steps_of(config)):
            synchronize(bench.device)
            times[number] = time.perf_counter()
            if number == 10:
                peak = peak_memory(bench.device)
            if number == 16:
                break
        steps.close()  # pyright: ignore[reportAttributeAccessIssue]
        with torch.device("meta"):
            network = build_model(model)
        count = sum(p.numel() for p in network.parameters())
        engine, precision = config.engine, bench.precision
        state = state_bytes(count, engine, 1, small=num_small(network))
        sample = Sample(case.side // 8, case.side // 8, TEXT[0], 0)
        plan = state.total + case.batch * activation_bytes(model, sample, precision, False)  # pyright: ignore[reportArgumentType]
        taken = {n: times[n] - times[n - 1] for n in range(8, 17)}
        plain = min(taken.values())
        figures[name] = {
            "peak_gib": peak / 2**30,
            "plan_gib": plan / 2**30,
            "look_s": taken[12] - plain,
            "save_s": taken[15] - plain,
        }
        values = f"{peak / 2**30:.2f}", f"{plan / 2**30:.2f}", f"{peak / plan:.3f}"
        table.add_row(name, *values, f"{taken[12] - plain:.3f}", f"{taken[15] - plain:.3f}")
    return figures, table


CALLS = {"runs": runs, "waits": waits, "bits": bits, "memory": memory}


def main(
    call: Annotated[str, typer.Argument(help=", ".join(CALLS))],
    tiny: Annotated[bool, typer.Option("--tiny", help="small networks")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="all figures")] = None,
) -> None:
    """One call: its table, and its figures as JSON with the device that gave them."""
    if call not in CALLS:
        raise InputError(f"call: got {call!r}, expected one of {', '.join(CALLS)}")
    if not (tiny or torch.cuda.is_available()):
        raise InputError("torch sees no GPU. Remedy: --tiny, which runs on a CPU too")
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if call != "runs":
            distributed.start(600)
        figures, table = CALLS[call](Bench(Path(folder), tiny))
        distributed.stop()
    gpu = torch.cuda.is_available()
    head = {
        "call": call,
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if gpu else "CPU",
        "torch": torch.__version__,
        "minutes": round((time.perf_counter() - begun) / 60, 2),
    }
    Console(width=140).print(table)
    print(json.dumps(head | {"figures": figures}, indent=1))
    if output is not None:
        output.write_text(json.dumps(head | {"figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
