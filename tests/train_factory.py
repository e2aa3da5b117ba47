"""Training runs for tests: a tiny dataset, a tiny config, and real processes."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.training.pieces import Pieces
from tests.forked import Forked, run_forked
from tests.shard_factory import Kind, make_dataset

ROOT = Path(__file__).parent.parent
CONFIG = """
seed: 3
data: {{path: {data}}}
model: {{size: debug}}
training: {{images: 192, global_batch: 8}}
optimizer: {{lr: 1e-3, weight_decay: 0.01, schedule: cosine, warmup_images: 32}}
ema: {{halflife_images: 64}}
engine: {{zero_stage: 0, precision: fp32, cpu_threads: 1, timeout_s: 300}}
run: {run}
checkpoint: {{every_steps: 6, keep: 2}}
monitor: {{every_steps: 1, mfu: false}}
"""


def write_config(folder: Path, name: str = "run", **dataset: Any) -> Path:
    """A config beside its dataset, both made if need be, as make_dataset takes it."""
    data, path = folder / "dataset", folder / f"{name}.yaml"
    if not data.exists():
        kind = Kind(encoders={"mini": (5, 8)}, channels=4)
        make_dataset(data, [((32, 32), 40), ((32, 32), 30), ((16, 64), 20)], kind, **dataset)
    path.write_text(CONFIG.format(data=data, run=folder / name))
    return path


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def command(module: str, *arguments: str, ranks: int = 1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *(launcher if ranks > 1 else []), "-m", module, *arguments]


def run(
    module: str, *arguments: str, ranks: int = 1, cwd: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    """The command to its end, what it imports of others being there already; module: -c for code."""
    return run_forked([module, *arguments], environment() | variables, cwd, ranks)


def train(config: Path | str, *options: str, ranks: int = 1, status: int = 0) -> str:
    """What a training run prints, which ends with this status; where that is not 0, the errors."""
    done = run("pipeline.train", str(config), *options, ranks=ranks)
    assert done.returncode == status, done.stderr
    assert status != 2 or "Traceback" not in done.stderr
    return done.stderr if status else done.stdout


def results(word: str, module: str, *arguments: str, ranks: int = 2) -> list[list[str]]:
    """The words behind `word` in each line that begins with it, of a module that ends well."""
    done = run(module, *arguments, ranks=ranks)
    assert done.returncode == 0, done.stderr
    lines = map(str.split, done.stdout.splitlines())
    return [line[1:] for line in lines if line[:1] == [word]]


def workers(process: subprocess.Popen[str] | Forked) -> list[int]:
    """Process ids of the ranks of pipeline.train that were started, by torchrun or without it."""
    if isinstance(process, Forked):
        return process.ranks
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    return [pid for pid, command in commands.items() if b"pipeline.train" in command]


def start(
    module: str, *arguments: str, ranks: int = 1, merged: bool = True, **variables: str
) -> Forked:
    """The command, running; merged: its output in one stream."""
    return Forked([module, *arguments], environment() | variables, ROOT, merged, ranks)


def torchrun(module: str, *arguments: str, ranks: int, **variables: str) -> subprocess.Popen[str]:
    """The command as torchrun starts it, running, its output in one stream."""
    return subprocess.Popen(
        command(module, *arguments, ranks=ranks),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment() | variables,
    )


def wait_for(process: subprocess.Popen[str] | Forked, text: str) -> list[str]:
    """Read the output until a line holds `text`; fails with all of it if none does."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"{text!r} never came:\n" + "".join(lines))


def scalars(run: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def histograms(run: Path, tag: str) -> list[tuple[int, list[float]]]:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"histograms": 0})
    events.Reload()
    return [(e.step, e.histogram_value.bucket) for e in events.Histograms(tag)]


def unlike(resumed: Path, whole: Path, step: int = 24) -> list[str]:
    """What a resumed run ends with that is not to the bit what an undisturbed one does."""
    stored = [Pieces(run / "checkpoints" / f"step_{step:08d}") for run in (resumed, whole)]
    ours, theirs = ({key: s.whole(*key.split("/")) for key in s.places} for s in stored)
    found = list(ours.keys() ^ theirs.keys())
    found += [n for n in ours.keys() & theirs.keys() if not torch.equal(ours[n], theirs[n])]
    found += ["optimizer_step"] if stored[0].optimizer_step != stored[1].optimizer_step else []
    # One point per step, in order: what a killed run logged beyond its checkpoint is gone.
    tags = ("loss/train", "optimizer/lr", "optimizer/ema_decay")
    return found + [tag for tag in tags if scalars(resumed, tag) != scalars(whole, tag)]


def check_as_undisturbed(run: Path, *options: str, step: int = 24) -> None:
    """The run ended with the bits of one on two ranks with these options, which is done here."""
    train(write_config(run.parent, "whole"), *options, ranks=2)
    assert unlike(run, run.parent / "whole", step) == []
