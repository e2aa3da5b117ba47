"""Training runs for tests: a tiny dataset, a tiny config, and real processes."""

import os
import subprocess
import sys
from pathlib import Path

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


def write_config(folder: Path, name: str = "run") -> Path:
    """A config beside its dataset, both made if need be."""
    data, path = folder / "dataset", folder / f"{name}.yaml"
    if not data.exists():
        kind = Kind(encoders={"mini": (5, 8)}, channels=4)
        make_dataset(data, [((32, 32), 40), ((32, 32), 30), ((16, 64), 20)], kind)
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


def train(config: Path | str, *options: str, ranks: int = 1) -> str:
    """What a training run prints, which ends well."""
    done = run("pipeline.train", str(config), *options, ranks=ranks)
    assert done.returncode == 0, done.stderr
    return done.stdout


def results(word: str, module: str, *arguments: str, ranks: int = 2) -> list[list[str]]:
    """The words behind `word` in each line that begins with it, of a module that ends well."""
    done = run(module, *arguments, ranks=ranks)
    assert done.returncode == 0, done.stderr
    lines = map(str.split, done.stdout.splitlines())
    return [line[1:] for line in lines if line[:1] == [word]]


def workers(process: subprocess.Popen[str] | Forked) -> list[int]:
    """Process ids of the ranks of pipeline.train that torchrun has started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    return [pid for pid, command in commands.items() if b"pipeline.train" in command]


def start(
    module: str, *arguments: str, ranks: int = 1, merged: bool = True, **variables: str
) -> subprocess.Popen[str] | Forked:
    """The command, running; merged: its output in one stream. Several ranks are torchrun's own."""
    if ranks == 1:
        return Forked([module, *arguments], environment() | variables, ROOT, merged)
    return subprocess.Popen(
        command(module, *arguments, ranks=ranks),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
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
