"""Two hosts on one machine: network, process and host-name namespaces joined by one cable that can be cut."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NAMES, ADDRESSES = ("flowmill-a", "flowmill-b"), ("10.213.7.1", "10.213.7.2")
CABLE = ("fm-cable-a", "fm-cable-b")


def lacking(programs: list[str], packages: list[str]) -> str | None:
    """Why hosts with these programs cannot be had here, after trying to install the packages."""
    if os.geteuid():
        return "needs root, for namespaces and daemons"
    if not shutil.which("ip") or not shutil.which("unshare"):
        return "needs iproute2 and util-linux"
    namespaces = ["unshare", "--net", "--pid", "--uts", "--fork", "--mount-proc", "true"]
    done = subprocess.run(namespaces, capture_output=True, text=True)
    if done.returncode:
        return f"no namespaces here: {done.stderr.strip()}"
    if not all(shutil.which(program) for program in programs):
        if not shutil.which("apt-get"):
            return f"no {' and '.join(programs)}, nor apt-get to install them"
        install = ["apt-get", "install", "-y", "--no-install-recommends", *packages]
        if subprocess.run(install, capture_output=True).returncode:
            return f"apt-get could not install {' and '.join(packages)}"
    return None


def _ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True)


class Hosts:
    """`start` runs a command on host 0 or 1; `stop` ends all that runs on both."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen] = []

    def start(self, host: int, command: list[str], **options) -> subprocess.Popen:
        """A process tree of its own on a host: when its first process ends, the kernel ends all of it."""
        name = NAMES[host]
        # A folder of Ray's and a /sys/fs/cgroup of its own; `ip netns exec` has hidden the real one.
        inner = (
            'hostname "$0" && mkdir -p /tmp/ray && mount -t tmpfs none /tmp/ray && '
            'mount -t tmpfs none /sys/fs/cgroup && exec "$@"'
        )
        process = subprocess.Popen(
            ["ip", "netns", "exec", name, "unshare", "--pid", "--uts", "--fork", "--kill-child",
             "--mount-proc", "sh", "-c", inner, name, *command],
            **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} | options,
        )  # fmt: skip
        self.started.append(process)
        return process

    def cut(self) -> None:
        _ip("-n", NAMES[0], "link", "set", CABLE[0], "down")

    def mend(self) -> None:
        _ip("-n", NAMES[0], "link", "set", CABLE[0], "up")

    def stop(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()


@contextmanager
def two_hosts(programs: list[str], packages: list[str]) -> Iterator[Hosts]:
    """Two hosts that have these programs; skips the test where they cannot be had."""
    if reason := lacking(programs, packages):
        pytest.skip(reason)
    hosts = Hosts()
    try:
        for name in NAMES:
            _ip("netns", "del", name, check=False)
            _ip("netns", "add", name)
            # `ip netns exec` shows a command these as its /etc/hosts.
            folder = Path("/etc/netns") / name
            folder.mkdir(parents=True, exist_ok=True)
            lines = [f"{a} {n}" for a, n in zip(ADDRESSES, NAMES, strict=True)]
            (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")
        _ip("link", "add", CABLE[0], "netns", NAMES[0], "type", "veth", "peer", "name", CABLE[1], "netns", NAMES[1])  # fmt: skip
        for name, cable, address in zip(NAMES, CABLE, ADDRESSES, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            _ip("-n", name, "link", "set", cable, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield hosts
    finally:
        hosts.stop()
        for name in NAMES:
            _ip("netns", "del", name, check=False)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
