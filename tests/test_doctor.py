"""Doctor on this machine as it is, and on ones broken on purpose: it names each lack."""

import os
import resource
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cluster.submit import parse_arguments
from pipeline import doctor
from pipeline.cli import STAGES
from tests.train_factory import command, environment, run

# tmpfs needs a mount namespace of one's own.
MOUNT = ["unshare", "--mount", "sh", "-c"]


def can_mount() -> bool:
    done = subprocess.run([*MOUNT, "mount -t tmpfs tmpfs /mnt"], capture_output=True)
    return done.returncode == 0


needs_mount = pytest.mark.skipif(not can_mount(), reason="may not mount a tmpfs of its own here")


def named(findings, name: str, state: str = "lack") -> doctor.Finding:
    finding = next(f for f in findings if f.name.startswith(name))
    assert finding.state == state
    return finding


def test_a_sound_machine_has_all_it_needs_and_says_so(tmp_path):
    findings = doctor.examine(str(tmp_path), 0.1)
    assert [f for f in findings if f.state == "lack"] == []
    names = " ".join(f.name for f in findings)
    for name in (
        "picture formats",
        "packages",
        "GPU",
        "attention sdpa",
        "shared memory",
        "open files",
        "disk",
        "Ray",
    ):
        assert name in names
    assert not list(tmp_path.iterdir())  # it cleans up after measuring


def test_the_command_ends_with_status_1_where_something_is_lacking(tmp_path):
    done = run("pipeline.doctor", "--folder", str(tmp_path), "--need-gib", "1e9", COLUMNS="200")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "expected at least 1e+09" in done.stdout
    assert "1 lacking" in done.stdout


def test_doctor_ends_with_the_command_that_the_folder_is_ready_for(tmp_path):
    assert doctor.next_command(None).startswith("flowmill doctor --folder")
    there = [("", f"prepare configs/prepare_folder.yaml sources.mine.path=PICTURES output={tmp_path}/prepared")]  # fmt: skip
    there += [("prepared/manifest.json", f"plan configs/train_dit_b.yaml data.path={tmp_path}/prepared")]  # fmt: skip
    there += [("runs/first/checkpoints/latest", f"sample {tmp_path}/runs/first --prompt")]
    for name, expected in there:
        if name:
            (tmp_path / name).parent.mkdir(parents=True)
            (tmp_path / name).touch()
        stage, *arguments = shlex.split(doctor.next_command(tmp_path).removeprefix("flowmill "))
        assert shlex.join([stage, *arguments]).startswith(expected)
        parse_arguments(STAGES[stage][0], arguments)
    done = run("pipeline.doctor", "--folder", str(tmp_path), "--need-gib", "0.1", COLUMNS="200")
    assert done.stdout.splitlines()[-1] == f"Next: {doctor.next_command(tmp_path)}"


def test_a_missing_compiler_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no g++" in named(doctor.check_compiler(), "compiler", "note").found
    # On a GPU blocks are compiled unless told otherwise, and the run would end at its first forward.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "no gcc" in named(doctor.check_compiler(), "compiler", "lack").found


def test_a_wrong_torch_is_named(monkeypatch, tmp_path):
    metadata = tmp_path / "torch-1.0.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = named(doctor.check_packages(), "packages")
    assert "torch 1.0.0, expected >=2.11" in finding.found
    assert "pip install" in finding.remedy


def test_a_torch_that_does_not_see_the_gpu_is_named(monkeypatch, tmp_path):
    # What a machine with a GPU and the CPU's torch shows: its driver's tool lists a card.
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 580.95, NVIDIA H100, 81559 MiB\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    finding = named(doctor.check_gpu(), "GPU")
    assert "H100" in finding.found
    assert "CUDA build" in finding.remedy


def in_namespace(mount: str, code: str) -> str:
    script = f"{mount} && exec {sys.executable} -c '{code}'"
    done = subprocess.run([*MOUNT, script], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_mount
def test_tiny_shared_memory_is_named():
    code = "from pipeline.doctor import *; print(*check_memory(), sep=chr(10))"
    out = in_namespace("mount -t tmpfs -o size=16m tmpfs /dev/shm", code)
    line = next(line for line in out.splitlines() if "shared memory" in line)
    assert "lack" in line
    assert "--shm-size" in line


@needs_mount
def test_a_full_disk_is_named():
    code = 'from pipeline.doctor import *; [print(f) for f in check_disk(Path("/mnt"), 1.0)]'
    out = in_namespace("mount -t tmpfs -o size=16m tmpfs /mnt", code)
    assert "lack" in out
    assert "0.02 GiB free, expected at least 1" in out


def test_an_unwritable_folder_is_named(tmp_path):
    if os.geteuid() == 0:
        folder = Path("/proc")  # which nobody may write to
    else:
        folder = tmp_path / "locked"
        folder.mkdir(mode=0o500)
    named(doctor.check_disk(folder, 0.0), "disk")


def test_a_low_limit_of_open_files_is_named():
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512));"
        "from pipeline.doctor import *; [print(f) for f in check_memory()]"
    )
    done = run("-c", code)
    line = next(line for line in done.stdout.splitlines() if "open files" in line)
    assert "lack" in line
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 512  # ours is untouched


def test_an_absent_ray_is_named(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        named(doctor.check_ray(), "Ray", "ok")
    assert str(port) in named(doctor.check_ray(), "Ray").found


@pytest.mark.slow
@pytest.mark.distributed
def test_all_reduce_is_timed_among_the_ranks_of_a_launch():
    done = run("pipeline.doctor", "--all-reduce", ranks=2)
    assert done.returncode == 0, done.stderr
    assert "64 MiB" in done.stdout
    assert "GB/s on 2 ranks" in done.stdout
    alone = run("pipeline.doctor", "--all-reduce")
    assert alone.returncode == 2
    assert "torchrun" in alone.stderr


@pytest.mark.slow
def test_every_node_of_a_ray_cluster_is_asked(tmp_path):
    """Two raylets; each answers with its own findings."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
    )
    try:
        cluster.add_node(num_cpus=1)
        env = environment() | {"RAY_ADDRESS": cluster.address, "COLUMNS": "200"}
        done = subprocess.run(
            command("pipeline.doctor", "--cluster", "--folder", str(tmp_path)),
            capture_output=True, text=True, env=env, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("shared memory") == 2
    finally:
        cluster.shutdown()
