"""The same work on 1, 2 and 4 simulated nodes of one machine: what each further node costs.

The loader: R ranks, a process each, read the same global batches. Preparation: the same four actors on one, two or
four raylets. All share the machine's cores, so that CPU seconds, not pictures per second, tell what grows.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console
from rich.table import Table

from tests import prep_factory
from tests.ray_cluster import RayCluster
from tests.shard_factory import Kind, make_dataset

NODES = (1, 2, 4)
GLOBAL_BATCH, WARM_UP, STEPS, ROUNDS = 256, 64, 2000, 3
# To warm up, then two sizes: the difference is the work, the rest the start.
PICTURES = (64, 256, 8192)
IDLE_S = 15.0

READ = """
import sys, time
from pipeline.data.config import DataConfig
from pipeline.data.loader import Loader
path, rank, ranks, batch, warm_up, steps = sys.argv[1], *map(int, sys.argv[2:])
loader = Loader(DataConfig(path=path, prefetch=0, verify="size"), global_batch=batch, seed=0,
                rank_of=(rank, ranks))
batches = loader.batches(0)
for _ in range(warm_up):
    next(batches)
begun, cpu = time.perf_counter(), time.process_time()
for _ in range(steps):
    next(batches)
print(time.perf_counter() - begun, time.process_time() - cpu)
"""


def read(dataset: Path, ranks: int) -> tuple[float, float]:
    """Wall and CPU seconds of STEPS global batches, the CPU of all ranks together."""
    arguments = [str(ranks), str(GLOBAL_BATCH), str(WARM_UP), str(STEPS)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", READ, str(dataset), str(rank), *arguments],
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # as torchrun sets it
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    times = [tuple(map(float, process.communicate()[0].split())) for process in processes]
    return max(wall for wall, _ in times), sum(cpu for _, cpu in times)


def cpu_seconds() -> float:
    """CPU seconds of the whole machine, which has to be idle beside: what workers spent goes when their raylet does."""
    spent = psutil.cpu_times()
    return spent.user + spent.nice + spent.system  # Ray runs its workers niced


def prepare(folder: Path, nodes: int) -> dict[str, float]:
    """Seconds per picture and at the start, of wall and of all processes' CPU, on so many raylets."""
    (folder / "ray").mkdir()
    cluster = RayCluster(folder / "ray")
    try:
        for place in range(nodes):
            cluster.start(4 // nodes, head=place == 0)
        environment = cluster.environment | {"RAY_ADDRESS": cluster.gcs}
        walls, cpus = [], []
        for count in PICTURES:
            config = prep_factory.write_config(
                folder / f"{count}.yaml",
                {"p": folder.parent / f"pictures{count}"},
                folder.parent / "vae",
                folder.parent / "text",
                encode={"batch_size": 16},
                samples_per_shard=32,
                output=str(folder / str(count)),
            )
            command = [sys.executable, "-m", "data_prep.prepare", str(config), "ray.num_actors=4"]
            begun, before = time.perf_counter(), cpu_seconds()
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
            walls.append(time.perf_counter() - begun)
            cpus.append(cpu_seconds() - before)
        before = cpu_seconds()
        time.sleep(IDLE_S)
        idle = (cpu_seconds() - before) / IDLE_S
    finally:
        cluster.stop()
    step = PICTURES[-1] - PICTURES[-2]
    wall, cpu = (values[-1] - values[-2] for values in (walls, cpus))
    return {
        "picture_ms": 1e3 * wall / step,
        "picture_cpu_ms": 1e3 * cpu / step,
        "start_s": walls[-2] - wall / step * PICTURES[-2],
        "start_cpu_s": cpus[-2] - cpu / step * PICTURES[-2],
        "idle_cores": idle,
    }


def main(
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
    what: Annotated[str, typer.Option(help="loader, prepare or both")] = "both",
) -> None:
    """Print a table for people; --json FILE writes a flat object for programs."""
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if what in ("both", "loader"):
            kind = Kind({"text": (16, 256)}, channels=4, ragged=False, bare=True)
            make_dataset(folder / "data", [((128, 128), 512)] * 8, kind)
            rounds = {
                ranks: [read(folder / "data", ranks) for _ in range(ROUNDS)] for ranks in NODES
            }
            for ranks, times in rounds.items():
                samples = GLOBAL_BATCH * STEPS
                found[f"loader_cpu_us_per_sample_{ranks}"] = (
                    1e6 * statistics.median(c for _, c in times) / samples
                )
                found[f"loader_samples_per_s_{ranks}"] = samples / statistics.median(
                    w for w, _ in times
                )
        if what in ("both", "prepare"):
            from tests.test_text_encoder import save_encoder
            from tests.test_vae import save_kl

            save_kl(folder / "vae"), save_encoder(folder / "text", "bert")
            for count in PICTURES:
                prep_factory.fill_folder(folder / f"pictures{count}", count)
            for nodes in NODES:
                (folder / f"nodes{nodes}").mkdir()
                for key, value in prepare(folder / f"nodes{nodes}", nodes).items():
                    found[f"prepare_{key}_{nodes}"] = value
    table = Table("", *(f"{nodes} node{'s' * (nodes > 1)}" for nodes in NODES))
    for key in dict.fromkeys(key.rsplit("_", 1)[0] for key in found):
        table.add_row(key, *(f"{found[f'{key}_{nodes}']:.2f}" for nodes in NODES))
    Console().print(table)
    if json_path:
        json_path.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    typer.run(main)
