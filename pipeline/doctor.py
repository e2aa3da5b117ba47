"""What this machine or cluster has and lacks, and the remedy for each lack: `flowmill doctor`."""

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import tempfile
import time
import tomllib
import warnings
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from models.command import plain_console, run_command
from models.config import InputError
from models.files import sync

PROJECT = Path(__file__).parent.parent / "pyproject.toml"
GIB = 1 << 30
COLOURS = {"ok": "green", "note": "yellow", "lack": "bold red"}


State = Literal["ok", "note", "lack"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at. A note costs speed or a feature; a lack ends a run."""

    name: str
    state: State
    found: str
    remedy: str = ""


def judged(name: str, fine: bool, found: str, remedy: str, bad: State = "lack") -> Finding:
    """What is fine needs no remedy."""
    return Finding(name, "ok" if fine else bad, found, "" if fine else remedy)


Findings = Generator[Finding]


def check_packages() -> Findings:
    """Python and every package that pyproject.toml asks for, in a version that it allows."""
    wanted = PROJECT.is_file() and tomllib.loads(PROJECT.read_text())["project"]["dependencies"]
    wanted = wanted or importlib.metadata.requires("flowmill") or []
    wrong = []
    for requirement in map(Requirement, wanted):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version}, expected {requirement.specifier}")
    fine = f"Python {platform.python_version()} and {len(wanted)} packages, as asked for"
    remedy = "pip install -c constraints.txt -e ."
    yield judged("packages", not wrong, "; ".join(wrong) or fine, remedy)


def check_gpu() -> Findings:
    """Whether the torch that is installed sees the GPUs that are there, and can talk among them."""
    import torch

    try:
        line = "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader"
        listed = subprocess.run(["nvidia-smi", *line], capture_output=True, text=True, timeout=60)
        cards = listed.stdout.strip().splitlines() if listed.returncode == 0 else []
    except FileNotFoundError:
        cards = []
    built = f"torch {torch.__version__} for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU'}"
    if torch.cuda.is_available():
        from torch.cuda import nccl

        torch.ones(8, device="cuda").sum().item()
        yield Finding("GPU", "ok", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}; {built}")  # fmt: skip
        there = torch.distributed.is_nccl_available()
        version = ".".join(map(str, nccl.version())) if there else "not in this torch"
        yield judged("NCCL", there, version, "install a CUDA build of torch")
    elif cards:
        remedy = "install the CUDA build of the same torch, one that the driver is new enough for"
        yield Finding("GPU", "lack", f"{'; '.join(cards)}, but {built} sees none", remedy)
    else:
        yield Finding("GPU", "note", f"none; {built}", "fine for trying; training wants a GPU")


def check_attention() -> Findings:
    """Each attention backend by a tiny call on the device that training would use."""
    import torch

    from models.layers import ATTENTION, attention_backend

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)  # fmt: skip
    for name, function in ATTENTION.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            runs = attention_backend(name, device, dtype) is function
        why = str(caught[-1].message).split(": ", 1)[-1][:120] if caught else "did not run"
        found, remedy = f"runs on {device}" if runs else why, "model.attention=sdpa does as well"
        yield judged(f"attention {name}", runs, found, remedy, "note")


def check_pictures() -> Findings:
    """Which formats of pictures can be decoded here, and which want a package."""
    # The module that decodes them is not of this package, whose imports end at its schema.
    images = importlib.import_module("data_prep.images")
    yield Finding("picture formats", "ok", ", ".join(images.FORMATS))
    for name, package in images.PLUGINS.items():
        if name not in images.FORMATS:
            yield Finding(f"pictures of {name}", "note", "not decoded", f"pip install {package}")


def check_compiler() -> Findings:
    """The compiler that torch.compile calls: for a GPU, where it is the default, Triton's."""
    import torch

    gpu = torch.cuda.is_available()
    name, package = ("gcc", "gcc libc6-dev") if gpu else ("g++", "g++")
    path, otherwise = shutil.which(name), ", or engine.compile=false" if gpu else ""
    remedy = f"apt install {package}: engine.compile needs it{otherwise}"
    yield judged("compiler", bool(path), path or f"no {name}", remedy, "lack" if gpu else "note")


def check_memory() -> Findings:
    """Memory and cores that this process may use, shared memory and open files."""
    cores = len(os.sched_getaffinity(0))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield Finding("cores and memory", "ok", f"{cores} cores, {total / GIB:.0f} GiB")
    shared = shutil.disk_usage("/dev/shm")
    found = f"{shared.free / GIB:.2f} GiB free in /dev/shm"
    remedy = "docker run --shm-size=16g; in Kubernetes an emptyDir of medium Memory"
    yield judged("shared memory", shared.free >= GIB, found, remedy)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    remedy = "ulimit -Hn 65536 in the launcher: shards are kept open"
    yield judged("open files", hard >= 4096 or hard < 0, f"{soft} now, {hard} at most", remedy)


def check_disk(folder: Path, need_gib: float) -> Findings:
    """Space, and the speed of a file written, synced and read back past the page cache where possible."""
    name = f"disk at {folder}"
    try:
        free = shutil.disk_usage(folder).free / GIB
        size = int(min(0.25, free / 4) * GIB)
        if free < need_gib:
            raise OSError(f"{free:.2f} GiB free, expected at least {need_gib:g}")
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            block, began = os.urandom(1 << 20), time.perf_counter()
            for _ in range(size >> 20):
                file.write(block)
            file.flush()
            sync(Path(file.name))
            write = size / (time.perf_counter() - began)
            skew = os.stat(file.name).st_mtime - time.time()
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            began = time.perf_counter()
            while file.read(1 << 20):
                pass
            read = size / (time.perf_counter() - began)
    except OSError as error:
        yield Finding(name, "lack", str(error), "another folder, or make room")
        return
    yield Finding(name, "ok", f"{free:.0f} GiB free, writes {write / 1e6:.0f} MB/s, reads {read / 1e6:.0f} MB/s")  # fmt: skip
    if abs(skew) > 5:
        found = f"{skew:+.0f} s between this clock and that of {folder}"
        yield Finding("clock", "lack", found, "run NTP on both: ages of files decide what is stale")


def check_ray() -> Findings:
    """How a Ray started here would be protected, and whether the one that RAY_ADDRESS names answers."""
    token = os.environ.get("RAY_AUTH_MODE") == "token"
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        yield Finding("Ray", "ok", "no RAY_ADDRESS: preparing starts a Ray of its own")
        return
    host, _, port = address.removeprefix("ray://").removeprefix("http://").partition(":")
    try:
        socket.create_connection((host, int(port or 6379)), timeout=5).close()
    except (OSError, ValueError) as error:
        remedy = "start the head, or correct RAY_ADDRESS"
        yield Finding("Ray", "lack", f"{address}: {error}", remedy)
        return
    safe = token or host in ("127.0.0.1", "localhost")
    found = f"{address} answers, {'with' if token else 'without'} token authentication"
    remedy = "RAY_AUTH_MODE=token on every node: whoever reaches it runs code on it"
    yield judged("Ray", safe, found, remedy, "note")


def examine(folder: str, need_gib: float) -> list[Finding]:
    """Every check on this machine; a check that fails itself is a lack too."""
    checks = [check_packages(), check_gpu(), check_attention(), check_compiler(), check_memory()]
    checks += [check_pictures(), check_disk(Path(folder), need_gib), check_ray()]
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check
        except Exception as error:  # noqa: BLE001 - a broken library is what a doctor looks for
            text = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            name = getattr(check, "__name__", "check")
            findings.append(Finding(name, "lack", text, "see the library's own message"))
    return findings


def examine_cluster(folder: str, need_gib: float) -> dict[str, list[Finding]]:
    """`examine` on every node of the Ray cluster, and how far each one's clock is from ours."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(
        address=os.environ.get("RAY_ADDRESS", "auto"),
        runtime_env={"working_dir": str(PROJECT.parent)} if PROJECT.is_file() else None,
        log_to_driver=False,
    )

    def ask() -> tuple[float, list[Finding]]:
        from pipeline.doctor import examine

        return time.time(), examine(folder, need_gib)

    task = ray.remote(num_cpus=0, max_retries=0)(ask)
    answers: dict[str, list[Finding]] = {}
    for node in ray.nodes():
        name = f"{node['NodeManagerHostname']} {node['NodeID'][:8]}"
        if not node["Alive"]:
            answers[name] = [Finding("node", "lack", "dead", "restart its raylet")]
            continue
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        began = time.time()
        try:
            theirs, found = ray.get(task.options(scheduling_strategy=place).remote(), timeout=300)
        except RayError as error:
            text = str(error).strip().splitlines()[-1]
            answers[name] = [Finding("node", "lack", text, "see `ray logs`")]
            continue
        skew = max(began - theirs, theirs - time.time(), 0.0)
        if skew > 5:
            found.append(Finding("clock", "lack", f"{skew:.0f} s off ours", "run NTP"))
        answers[name] = found
    return answers


def time_all_reduce() -> Findings:
    """Bus bandwidth of all-reduce among the ranks of this launch, 2 (n - 1) / n x bytes / second."""
    import torch
    import torch.distributed as dist

    from pipeline import distributed

    if distributed.world_size() < 2:
        raise InputError(
            "--all-reduce: got one process, expected several. Remedy: torchrun --nproc-per-node N "
            "-m pipeline.doctor --all-reduce"
        )
    device, ranks = distributed.start(600), distributed.world_size()
    for mib in (1, 16, 64):
        data = torch.ones(mib << 18, device=device)
        seconds = []
        for _ in range(6):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(data)
            # Reading an element waits for the sum.
            data[0].item()
            seconds.append(time.perf_counter() - began)
        best = min(seconds[1:])
        speed = 2 * (ranks - 1) / ranks * data.nbytes / best / 1e9
        yield Finding(f"all-reduce {mib} MiB", "ok", f"{1000 * best:.2f} ms, {speed:.2f} GB/s on {ranks} ranks")  # fmt: skip
    distributed.stop()


def show(console: Console, title: str, findings: list[Finding]) -> int:
    """Print a table; returns the number of lacks."""
    table = Table(title=title, title_justify="left", show_lines=False)
    for column in ("", "what", "found", "remedy"):
        table.add_column(column, overflow="fold")
    for f in findings:
        table.add_row(Text(f.state, COLOURS[f.state]), f.name, f.found, f.remedy)
    console.print(table)
    return sum(f.state == "lack" for f in findings)


def _holding(folder: Path, name: str) -> list[Path]:
    """The folders in which runs and datasets usually are that hold `name`."""
    places = [place for depth in ("", "*/", "runs/*/") for place in folder.glob(depth + name)]
    return [folder.joinpath(place.parents[name.count("/")]) for place in sorted(places)]


def next_command(folder: Path | None) -> str:
    """The command that follows, by what lies in the folder: nothing of ours, a dataset or a run."""
    if folder is None:
        return "flowmill doctor --folder FOLDER, where shards and runs will be; or make demo"
    for run in _holding(folder, "checkpoints/latest"):
        return f'flowmill sample {run} --prompt "a red apple"'
    for dataset in _holding(folder, "manifest.json"):
        return f"flowmill plan configs/train_dit_b.yaml data.path={dataset}"
    options = f"sources.mine.path=PICTURES output={folder / 'prepared'} --dry-run"
    return f"flowmill prepare configs/prepare_folder.yaml {options}"


def main(
    folder: Annotated[
        Path | None, typer.Option(help="where shards and runs will be [default: here]")
    ] = None,
    need_gib: Annotated[float, typer.Option(help="free space that counts as enough")] = 5.0,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="ask every node of the Ray cluster")
    ] = False,
    all_reduce: Annotated[
        bool, typer.Option("--all-reduce", help="time it among the ranks of this launch")
    ] = False,
) -> None:
    """What this machine or cluster has and lacks; status 1 if something is lacking."""
    if cluster and all_reduce:
        raise InputError("--cluster and --all-reduce: one at a time")
    place = folder or Path(".")
    if not place.is_dir():
        raise InputError(f"--folder {folder}: no such folder")
    if all_reduce:
        answers = {"all-reduce": [*time_all_reduce()]}
    elif cluster:
        answers = examine_cluster(str(place.resolve()), need_gib)
    else:
        answers = {socket.gethostname(): examine(str(place), need_gib)}
    console = plain_console(100)
    if int(os.environ.get("RANK", 0)):
        return
    lacks = sum(show(console, name, findings) for name, findings in answers.items())
    if lacks:
        console.print(f"{lacks} lacking. Next: the remedies above, then doctor again")
        raise typer.Exit(1)
    console.print(f"Next: {next_command(folder)}")


if __name__ == "__main__":
    run_command(main, "pipeline/README.md#before-it-starts")
