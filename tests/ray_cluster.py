"""Real Ray clusters for tests: a head and further raylets on loopback, each on its own ports, behind a token."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
RAY = str(BIN / "ray")
TOKEN = "0123456789abcdef" * 4
NODE_PORTS = (
    "node-manager-port",
    "object-manager-port",
    "dashboard-agent-listen-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)
HEAD_PORTS = ("port", "dashboard-port", "ray-client-server-port")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class RayCluster:
    """`environment` reaches it: the job server's address and the token."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "token").write_text(TOKEN)
        self.environment = {
            **{k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONPATH")},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        }
        self.nodes: list[subprocess.Popen] = []

    def start(self, num_cpus: int, head: bool = False, tries: int = 3) -> subprocess.Popen:
        """A raylet, with the cluster's services if it is the head; on a busy machine Ray may give up once."""
        ports = {name: free_port() for name in (*NODE_PORTS, *(HEAD_PORTS if head else ()))}
        command = [RAY, "start", "--block", "--node-ip-address", "127.0.0.1", "--num-gpus", "0"]
        command += ["--num-cpus", str(num_cpus), "--object-store-memory", str(100 << 20)]
        command += ["--disable-usage-stats"]
        if head:
            self.gcs = f"127.0.0.1:{ports['port']}"
            self.address = f"http://127.0.0.1:{ports['dashboard-port']}"
            self.environment["RAY_API_SERVER_ADDRESS"] = self.address
            command += ["--head", "--dashboard-host", "127.0.0.1"]
        else:
            command += ["--address", self.gcs]
            # A node's own folder, as on a host of its own: a dying node cleans up there.
            own = 'mount -t tmpfs none /tmp/ray && exec "$@"'
            user = [] if os.geteuid() == 0 else ["--map-root-user"]
            command = ["unshare", "--mount", *user, "sh", "-c", own, "sh", *command]
        command += [f"--{name}={port}" for name, port in ports.items()]
        known = set() if head else self._alive()
        log = (self.folder / f"node{len(self.nodes)}.log").open("w")
        node = subprocess.Popen(
            command,
            env=self.environment,
            cwd=self.folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        self.nodes.append(node)
        joined = self._takes_jobs if head else lambda: self._alive() - known
        self._until(lambda: node.poll() is not None or joined())
        if node.poll() is not None:
            self.nodes.remove(node)
            assert tries, (self.folder / f"node{len(self.nodes)}.log").read_text()
            return self.start(num_cpus, head, tries - 1)
        return node

    def _takes_jobs(self) -> bool:
        port = int(self.address.rsplit(":", 1)[1])
        if socket.socket().connect_ex(("127.0.0.1", port)):
            return False
        probe = [RAY, "job", "submit", "--", "true"]
        return not subprocess.run(probe, env=self.environment, capture_output=True).returncode

    def _alive(self) -> set[str]:
        """Ids of the nodes that the head counts on."""
        headers = {"Authorization": f"Bearer {TOKEN}"}
        request = urllib.request.Request(f"{self.address}/api/v0/nodes", headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            nodes = json.load(answer)["data"]["result"]["result"]
        return {node["node_id"] for node in nodes if node["state"] == "ALIVE"}

    def _until(self, condition: Callable[[], object], timeout_s: float = 300) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "the cluster does not come up"
            time.sleep(1)

    def kill_raylet(self, node: subprocess.Popen) -> None:
        """SIGKILL to what makes it a node; the rest of it follows by itself."""
        for process in psutil.Process(node.pid).children(recursive=True):
            if process.name() == "raylet":
                process.send_signal(signal.SIGKILL)

    def stop(self) -> None:
        started = []
        for node in reversed(self.nodes):
            if node.poll() is None:
                started += psutil.Process(node.pid).children(recursive=True)
                node.terminate()
        for node in self.nodes:
            node.wait(timeout=60)
        for process in psutil.wait_procs(started, timeout=10)[1]:
            process.kill()


@contextmanager
def ray_cluster(folder: Path, num_cpus: list[int]) -> Iterator[RayCluster]:
    """A head and further raylets with so many CPUs each."""
    cluster = RayCluster(folder)
    try:
        for place, count in enumerate(num_cpus):
            cluster.start(count, head=place == 0)
        yield cluster
    finally:
        cluster.stop()


def copy_checkout(folder: Path) -> Path:
    """The repository as a user has it: what git ignores is not there."""
    root = Path(__file__).parent.parent
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=root, capture_output=True
    ).stdout.decode()
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
    return folder
