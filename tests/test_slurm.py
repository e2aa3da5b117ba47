"""Real Slurm on two hosts of one machine: limits, requeues and cancellations leave what can be resumed."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_prep.audit import verify
from data_prep.schema import read_manifest
from pipeline.training.checkpoint import candidates, faults
from tests import prep_factory, train_factory
from tests.forked import wait_until
from tests.hosts import ADDRESSES, NAMES, Hosts, two_hosts
from tests.ray_cluster import BIN

ROOT = Path(__file__).parent.parent
CONFIG = """
ClusterName=flowmill
SlurmctldHost={names[0]}({addresses[0]})
SlurmctldPort=17001
SlurmdPort=17002
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
NodeName={names[0]} NodeAddr={addresses[0]} CPUs=2
NodeName={names[1]} NodeAddr={addresses[1]} CPUs=2
PartitionName=main Nodes=ALL Default=YES State=UP
"""


def shellcheck() -> str:
    found = BIN / "shellcheck"
    return str(found) if found.exists() else "shellcheck"


@pytest.mark.parametrize("path", sorted((ROOT / "cluster").rglob("*.s[bh]*")), ids=lambda p: p.name)
def test_shellcheck_has_nothing_to_say(path):
    done = subprocess.run([shellcheck(), str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


class Slurm:
    """Two nodes, one of them also the controller; `run` is a command on it."""

    def __init__(self, hosts: Hosts, folder: Path):
        self.hosts, self.folder = hosts, folder
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.environment |= {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(folder),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        self.environment.pop("PYTHONPATH", None)
        for name in ("state", *(f"spool.{name}" for name in NAMES)):
            (folder / name).mkdir()
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        text = CONFIG.format(folder=folder, names=NAMES, addresses=ADDRESSES)
        (folder / "slurm.conf").write_text(text)
        key = ["mungekey", "--create", f"--keyfile={folder}/munge.key"]
        subprocess.run(key, check=True, capture_output=True)
        self._daemon(0, "munged", "--foreground", "--force", f"--key-file={folder}/munge.key",
                     f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid",
                     f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed")  # fmt: skip
        self.wait(lambda: (folder / "munge.socket").exists(), 30)
        self._daemon(0, "slurmctld", "-D", "-c")
        for host, name in enumerate(NAMES):
            self._daemon(host, "slurmd", "-D", "-N", name)
        self.wait(lambda: self.run("sinfo", "-h", "-o", "%D %t").strip() == "2 idle", 60)

    def _daemon(self, host: int, *command: str) -> None:
        log = (self.folder / f"{command[0]}-{host}.log").open("w")
        self.hosts.start(host, list(command), env=self.environment, stdout=log, stderr=log)

    def run(self, *command: str, cwd: Path | None = None) -> str:
        process = self.hosts.start(0, list(command), env=self.environment, cwd=cwd)
        return process.communicate()[0]

    def submit(self, checkout: Path, *arguments: str) -> str:
        """sbatch; the job's number."""
        shown = self.run("sbatch", "--nodes=2", "--cpus-per-task=2", *arguments, cwd=checkout)
        assert shown.startswith("Submitted batch job"), shown
        return shown.split()[-1]

    def state(self, job: str) -> str:
        """Such as RUNNING, and how often it was requeued."""
        shown = self.run("scontrol", "show", "job", job)
        fields = dict(item.split("=", 1) for item in shown.split() if "=" in item)
        return f"{fields['JobState']} {fields['Restarts']}"

    def wait(self, condition: Callable[[], bool], timeout_s: float) -> None:
        try:
            wait_until(condition, timeout_s)
        except AssertionError as error:
            logs = [f"--- {p.name}\n{p.read_text()[-3000:]}" for p in self.folder.glob("*.log")]
            raise AssertionError("\n".join(logs)) from error


@pytest.fixture(scope="module")
def slurm(tmp_path_factory) -> Iterator[Slurm]:
    with two_hosts(["slurmctld", "munged"], ["slurm-wlm", "munge"]) as hosts:
        yield Slurm(hosts, tmp_path_factory.mktemp("slurm"))


@pytest.mark.slow
@pytest.mark.distributed
def test_the_time_limit_saves_and_requeues_and_cancelling_leaves_a_sound_checkpoint(
    slurm, checkout, tmp_path
):
    config = train_factory.write_config(tmp_path)
    log = tmp_path / "job.log"
    job = slurm.submit(
        checkout, "--time=7", "--signal=B:USR1@180", f"--output={log}", "cluster/slurm/train.sbatch",
        str(config), "training.images=8000000", "engine.zero_stage=2", "checkpoint.every_steps=100000",
    )  # fmt: skip
    slurm.wait(lambda: log.exists() and "stopped by SIGUSR1 at step" in log.read_text(), 480)
    (saved,) = candidates(tmp_path / "run")
    step = int(saved.name.removeprefix("step_"))
    slurm.wait(lambda: f"resuming at step {step} of" in log.read_text(), 480)
    assert slurm.state(job) == "RUNNING 1"
    slurm.wait(lambda: f"step {step + 20}/" in log.read_text(), 240)
    slurm.run("scancel", job)
    slurm.wait(lambda: slurm.state(job) == "CANCELLED 1", 90)
    newest = candidates(tmp_path / "run")[0]
    assert newest.name > saved.name
    assert faults(newest) == []


@pytest.mark.slow
@pytest.mark.distributed
def test_a_preparation_on_two_nodes_is_requeued_at_its_limit_and_ends_whole(
    slurm, checkout, tmp_path, vae_folder, text_folder
):
    config = prep_factory.config_of_pictures(tmp_path, 40, vae_folder, text_folder)
    dataset, log = tmp_path / "dataset", tmp_path / "job.log"

    def begun() -> bool:
        return any((dataset / "work" / "commits").rglob("*.json"))

    for _ in range(3):  # on a busy machine Ray gives up starting now and then
        job = slurm.submit(
            checkout, "--time=20", f"--output={log}", "cluster/slurm/prepare.sbatch", str(config),
            "ray.num_actors=3",
        )  # fmt: skip
        slurm.wait(lambda job=job: begun() or slurm.state(job) == "FAILED 0", 700)
        if begun():
            break
        assert "Ray did not start" in log.read_text()
    slurm.run("scancel", "--batch", "--signal=USR1", job)  # what the limit sends
    slurm.wait(lambda: slurm.state(job) == "COMPLETED 1", 400)
    assert read_manifest(dataset).counts.kept == 40
    assert verify(dataset) == []


@pytest.mark.slow
def test_a_wrong_config_fails_at_once_and_is_not_requeued(slurm, checkout, tmp_path):
    log = tmp_path / "job.log"
    job = slurm.submit(
        checkout, f"--output={log}", "cluster/slurm/train.sbatch", "configs/train_dit_b.yaml",
        "data.path=/nowhere",
    )  # fmt: skip
    slurm.wait(lambda: slurm.state(job) == "FAILED 0", 120)
    assert "error /nowhere" in log.read_text()
