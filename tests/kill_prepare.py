"""Kill test: `python -m tests.kill_prepare --kills 30`. Runs prepare on two raylets and kills at random.

Victims are an actor, a process that decodes or scans, the second raylet with all its workers, and the
driver, which is then started again. Each run ends only when the dataset is whole, and is compared with an
undisturbed one of one actor on one raylet: every byte of every file, so no sample is lost or doubled.
With `--generations 3` pictures are added twice, the last of them while the second generation is being made, and
a tenth of each generation are files that the one before it has.
"""

import contextlib
import io
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil
import typer

from data_prep.schema import read_shard_table
from tests.prep_factory import dataset_bytes, encoded, fill_folder, pixels, write_config
from tests.ray_cluster import RayCluster, below

ROOT = Path(__file__).parent.parent
VICTIMS = ("actor", "decoder", "scanner", "raylet", "driver")
CMDLINES = {
    "actor": "ray::(Shard|Layer)Encoder",
    "decoder": "data_prep.decoder",
    "scanner": "ray::_scan",
}


class TwoRaylets(RayCluster):
    """A head and, once it is asked for, a second node, two CPUs each."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._head, self._other = self.start(2, head=True), None
        more = {"RAY_ADDRESS": self.gcs, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.environment |= more | {"RAY_USAGE_STATS_ENABLED": "0"}

    def victims(self, kind: str) -> list[psutil.Process]:
        other = below(self._other) if self._other else []
        if kind == "raylet":
            return [p for p in other if p.name() == "raylet"]
        return [p for p in below(self._head) + other if re.search(CMDLINES[kind], command_line(p))]

    def new_other(self) -> None:
        """The second node; of one whose raylet was killed nothing is left."""
        if self._other:
            self.end(self._other)
        self._other = self.start(2)


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def drive(config: Path, environment: dict[str, str], *overrides: str) -> subprocess.Popen:
    """A driver of its own; what it says is in its `log` beside the config."""
    with (config.parent / "driver.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "data_prep.prepare", str(config), *overrides],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def disturbed_run(
    cluster: TwoRaylets,
    config: Path,
    overrides: list[str],
    choose: Callable[[list[str]], str | None],
) -> Counter[str]:
    """Prepare to the end, killing whom `choose` names of those that are alive; returns the kills by kind."""
    killed: Counter[str] = Counter()
    driver = drive(config, cluster.environment, *overrides)
    try:
        while (status := driver.poll()) != 0:
            if status is not None:  # killed by us, or fallen with its raylet or actors: start again
                killed["driver ended"] += 1
                driver = drive(config, cluster.environment, *overrides)
            alive = [kind for kind in VICTIMS[:-1] if cluster.victims(kind)]
            kind = choose([*alive, "driver"])
            if kind == "driver":
                driver.kill()
                driver.wait()
            elif kind and (victims := cluster.victims(kind)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    random.choice(victims).send_signal(signal.SIGKILL)
                if kind == "raylet":
                    cluster.new_other()
            if kind:
                killed[kind] += 1
            else:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    driver.wait(timeout=0.2)
    finally:
        driver.kill()
        driver.wait()
    return killed


def sample_keys(dataset: Path) -> list[str]:
    """The keys of all samples in the dataset's tars, in order."""
    keys = []
    for row in read_shard_table(dataset).to_pylist():
        with tarfile.open(fileobj=io.BytesIO((dataset / row["path"]).read_bytes())) as tar:
            keys += [name.split(".")[0] for name in tar.getnames() if name.endswith(".json")]
    return keys


def some_pictures(folder: Path, count: int, first: int = 0) -> Path:
    """Captioned pictures in a folder, every fiftieth of them broken."""
    fill_folder(folder, count, first)
    for i in range(first, first + count, 50):
        (folder / f"cut{i}.png").write_bytes(encoded(pixels(i))[:-100])
        (folder / f"cut{i}.txt").write_text("cut")
    return folder


def config_of_layer(folder: Path, temperature: float | None) -> Path:
    """A second encoder over the base: of a captioner's words, or of the base's, whose pictures are gone by now."""
    from tests.test_captioner import save_captioner
    from tests.test_text_encoder import save_encoder

    encoder = {"path": str(save_encoder(folder / "t5", "t5")), "max_length": 8}
    config = {"base": str(folder / "base"), "text_encoders": {"t5": encoder}}
    if temperature is None:
        shutil.rmtree(folder / "pictures")
    else:
        captioner = {
            "path": str(save_captioner(folder / "captioner", seed=3)),
            "temperature": temperature,
        }
        captioner |= {"prompts": ["describe", "w1"], "max_new_tokens": 40, "pixels": 64}
        config["captions"] = {"captioner": captioner}
    path = folder / "layer.yaml"
    path.write_text(json.dumps(config))
    return path


def at_random(rng: random.Random, budget: int, mean_s: float) -> Callable[[list[str]], str | None]:
    """Choose a victim about every `mean_s`, `budget` times."""
    due, left = time.monotonic() + rng.expovariate(1 / mean_s), budget

    def choose(alive: list[str]) -> str | None:
        nonlocal due, left
        if left == 0 or time.monotonic() < due:
            return None
        due, left = time.monotonic() + rng.expovariate(1 / mean_s), left - 1
        return rng.choice(alive)

    return choose


@dataclass
class Sources:
    """A folder of pictures that grows by what lies ready beside it."""

    folder: Path
    count: int
    each: int
    added: int = 0

    def ready(self) -> None:
        for number in range(self.count):
            folder = self.folder.parent / "ready" / f"{number}"
            some_pictures(folder, self.each, first=number * self.each * 9 // 10)

    def empty(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.added = 0

    def add(self, upto: int) -> None:
        while self.added < upto:
            name = f"{self.added}"
            shutil.copytree(self.folder.parent / "ready" / name, self.folder / name)
            self.added += 1

    def hurried(
        self, choose: Callable[[list[str]], str | None], output: Path
    ) -> Callable[[list[str]], str | None]:
        """Choose victims, and with the first one after generation 1 was begun add what is for the next."""

        def chosen(alive: list[str]) -> str | None:
            victim = choose(alive)
            if victim and (output / "work" / "g0001" / "catalog").exists():
                self.add(self.count)
            return victim

        return chosen


def main(
    kills: Annotated[int, typer.Option(min=1, help="how many in all")] = 30,
    a_run: Annotated[int, typer.Option(min=1, help="how many a run, before it is left alone")] = 8,
    pictures: Annotated[int, typer.Option(min=50)] = 1200,
    generations: Annotated[int, typer.Option(min=1, help="of `pictures` each")] = 1,
    every_s: Annotated[float, typer.Option(help="mean time between kills")] = 4.0,
    layer: Annotated[
        bool, typer.Option("--layer", help="of a text layer over the pictures")
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="of a captioner that writes the layer's captions")
    ] = None,
    seed: int = 0,
) -> None:
    """Kill, resume, compare; exit status 1 where a byte differs."""
    from tests.test_text_encoder import save_encoder
    from tests.test_vae import save_kl

    rng, total = random.Random(seed), Counter[str]()
    random.seed(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = Sources(folder / "pictures", generations, pictures)
        sources.ready()
        config = write_config(
            folder / "c.yaml",
            {"pictures": sources.folder},
            save_kl(folder / "vae"),
            save_encoder(folder / "text", "bert"),
            images={"resolution": 64, "bucket_multiple": 8},
            samples_per_shard=40,
        )
        cluster = TwoRaylets(folder)
        try:
            if layer:
                sources.add(1)
                base = drive(config, cluster.environment, f"output={folder / 'base'}")
                assert base.wait() == 0, (folder / "driver.log").read_text()
                config = config_of_layer(folder, temperature)
            output = folder / "reference"
            for number in range(generations):
                sources.add(number + 1)
                alone = drive(config, cluster.environment, f"output={output}", "ray.num_actors=1")
                assert alone.wait() == 0, (folder / "driver.log").read_text()
            expected, keys = dataset_bytes(output), sample_keys(output)
            print(f"undisturbed: {len(keys)} samples, {len(expected)} files", flush=True)
            cluster.new_other()
            while sum(total[kind] for kind in VICTIMS) < kills:
                left = kills - sum(total[kind] for kind in VICTIMS)
                output = folder / f"run-{total['runs']}"
                overrides = [f"output={output}", "ray.num_actors=3", "ray.decoders_per_actor=1"]
                choose = sources.hurried(at_random(rng, min(a_run, left), every_s), output)
                sources.empty()
                killed = Counter[str]()
                for number in range(generations):
                    sources.add(number + 1)
                    killed += disturbed_run(cluster, config, overrides, choose)
                found, now = dataset_bytes(output), Counter(sample_keys(output))
                same = sum(found.get(name) == data for name, data in expected.items())
                lost, doubled = set(keys) - now.keys(), [k for k, n in now.items() if n > 1]
                print(
                    f"run {total['runs']}: {dict(killed)}; {same} of {len(expected)} files identical, "
                    f"{len(found.keys() - expected.keys())} others, {len(lost)} lost, {len(doubled)} doubled",
                    flush=True,
                )
                total += killed
                total["runs"] += 1
                if found != expected or lost or doubled:
                    sys.exit(1)
                shutil.rmtree(output)
        finally:
            cluster.stop()
    print(f"all the same after {dict(total)}")


if __name__ == "__main__":
    typer.run(main)
