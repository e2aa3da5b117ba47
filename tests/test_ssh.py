"""The deepspeed launcher over real ssh daemons: one rank on each of two hosts."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import train_factory
from tests.hosts import NAMES, Hosts, two_hosts
from tests.ray_cluster import BIN

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.distributed]
SSHD = """
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PidFile none
PermitRootLogin yes
"""
SSH = """
IdentityFile {folder}/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
"""


@pytest.fixture
def hosts(tmp_path) -> Iterator[Hosts]:
    """Two hosts, each with an sshd that lets in who has the key; `tmp_path`/bin/ssh uses it."""
    with two_hosts(["sshd", "pdsh"], ["openssh-server", "pdsh"]) as made:
        Path("/run/sshd").mkdir(exist_ok=True)
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")]
        subprocess.run(keygen, check=True)
        for name, text in (("sshd_config", SSHD), ("ssh_config", SSH)):
            (tmp_path / name).write_text(text.format(folder=tmp_path))
        client = tmp_path / "bin" / "ssh"
        client.parent.mkdir()
        client.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {tmp_path}/ssh_config "$@"\n')
        client.chmod(0o755)
        daemon = [shutil.which("sshd") or "", "-D", "-e", "-f", str(tmp_path / "sshd_config")]
        for host in (0, 1):
            made.start(host, daemon)
        yield made


def test_the_deepspeed_launcher_trains_on_the_machines_of_a_hostfile(hosts, tmp_path):
    config = train_factory.write_config(tmp_path)
    (tmp_path / "hostfile").write_text("".join(f"{name} slots=1\n" for name in NAMES))
    environment = train_factory.environment() | {
        "HOSTFILE": str(tmp_path / "hostfile"),
        "DS_ACCELERATOR": "cpu",
        "PDSH_RCMD_TYPE": "ssh",
        "PATH": f"{tmp_path}/bin:{BIN}:{os.environ['PATH']}",
    }
    command = [str(ROOT / "cluster" / "ssh" / "train.sh"), str(config), "engine.zero_stage=2"]
    launcher = hosts.start(0, command, env=environment)
    output = launcher.communicate(timeout=300)[0]
    assert launcher.returncode == 0, output
    assert all(f"{name}: " in output for name in NAMES), output
    record = json.loads((tmp_path / "run/checkpoints/step_00000024/checkpoint.json").read_text())
    assert record["world_size"] == 2
    train_factory.check_as_undisturbed(tmp_path / "run", "engine.zero_stage=2")
