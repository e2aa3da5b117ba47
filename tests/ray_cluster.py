"""Real Ray clusters for tests: a head and further raylets on loopback, each on its own ports, behind a token."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.forked import free_port, wait_until

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


RUNNING: list["RayCluster"] = []


class RayCluster:
    """`environment` reaches it: the job server's address and the token; `folder` keeps what its nodes log."""

    def __init__(self, folder: Path):
        self.folder = folder
        RUNNING.append(self)
        (folder / "token").write_text(TOKEN)
        self.environment = {
            **{k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONPATH")},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            # On a busy machine what is only slow is not to be taken for dead.
            "RAY_worker_niceness": "0",
            "RAY_agent_register_timeout_ms": "300000",
            "RAY_worker_register_timeout_seconds": "300",
        }
        self.nodes: list[subprocess.Popen] = []

    def start(self, num_cpus: int, head: bool = False, tries: int = 3) -> subprocess.Popen:
        """A raylet, with the cluster's services if it is the head; on a busy machine Ray may give up once."""
        number = len(list(self.folder.glob("node*.log")))
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
            # A node's own folder and name, as on a host of its own: a dying node cleans up there.
            own = self.folder / f"ray{number}"
            own.mkdir()
            mount = f'mount --bind "{own}" /tmp/ray && hostname "node{number}" && exec "$@"'
            user = [] if os.geteuid() == 0 else ["--map-root-user"]
            command = ["unshare", "--mount", "--uts", *user, "sh", "-c", mount, "sh", *command]
        command += [f"--{name}={port}" for name, port in ports.items()]
        known = set() if head else self._alive()
        log = self.folder / f"node{number}.log"
        node = subprocess.Popen(
            command,
            env=self.environment,
            cwd=self.folder,
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.nodes.append(node)
        joined = self._takes_jobs if head else lambda: self._alive() - known
        over = lambda: node.poll() is not None or joined()  # noqa: E731
        wait_until(over, 300, "the cluster does not come up")
        if node.poll() is not None:
            self.nodes.remove(node)
            assert tries, log.read_text()
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

    def kill_raylet(self, node: subprocess.Popen) -> None:
        """SIGKILL to what makes it a node; the rest of it follows by itself."""
        for process in below(node):
            if process.name() == "raylet":
                process.send_signal(signal.SIGKILL)

    def end(self, node: subprocess.Popen) -> None:
        """Kill all of a node, which may have lost its raylet."""
        started = below(node)
        node.kill()
        node.wait()
        for process in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(started, timeout=30)
        self.nodes.remove(node)

    def stop(self) -> None:
        RUNNING.remove(self)
        started = [process for node in self.nodes for process in below(node)]
        for node in reversed(self.nodes):
            node.terminate()
        for node in self.nodes:
            node.wait(timeout=60)
        for process in psutil.wait_procs(started, timeout=10)[1]:
            process.kill()


def below(node: subprocess.Popen) -> list[psutil.Process]:
    """All processes of a node, none where it has ended."""
    try:
        return psutil.Process(node.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def logs() -> list[str]:
    """Where each Ray that runs now keeps its log, with what its nodes said at the start."""
    places = [str(cluster.folder / "*.log") for cluster in RUNNING]
    ray = sys.modules.get("ray")
    if RUNNING or (ray and ray.is_initialized()):
        places.append(f"{Path('/tmp/ray/session_latest').resolve()}/logs")
    return places


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
