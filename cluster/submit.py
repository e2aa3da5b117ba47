"""Stages on a cluster: `flowmill submit prepare|train|evaluate CONFIG.yaml [section.key=value ...] --address URL`.

The working directory is uploaded, so that nothing of flowmill need be installed there; its dependencies
must be. `ray job logs|status|stop` attend to a job. `--launcher slurm` calls sbatch instead.
"""

import asyncio
import importlib
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import typer
import yaml

from models.command import load_config, read_yaml, run_command
from models.config import InputError, flatten

PACKAGES = ("models", "data_prep", "pipeline", "cluster")
# The most bytes of one request to Ray's dashboard.
UPLOAD_LIMIT_BYTES = 100 << 20
SECRET = ("TOKEN", "SECRET", "PASSWORD", "CREDENTIAL", "ACCESS_KEY", "API_KEY")
# The class of click, or of the copy of click inside typer.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
# The keys of files and folders that a preparation or a training reads.
READ = re.compile(
    r"(sources|text_encoders)\..+\.path|(vae|vision_encoder)\.path|base|captions\.table|(stages\..+\.)?"
    r"(data\.(datasets\..+\.)?(path|layers\..+)|encoders\.(vae|text\..+)|model\.init_from|start_from\.run)"
)


Action = Literal["prepare", "train", "evaluate"]
MODULES: dict[Action, str] = {
    "prepare": "data_prep.prepare",
    "train": "cluster.train_job",
    "evaluate": "pipeline.evaluate",
}


Job = dict[str, Any]
"""What Ray is asked to run: arguments of its `submit_job`."""


def command_line(job: Job, address: str) -> str:
    """The `ray job submit` that asks for the same."""
    environment, gpus = dict(job["runtime_env"]), job["entrypoint_num_gpus"]
    options = ["--working-dir", environment.pop("working_dir")]
    options += ["--runtime-env-json", json.dumps(environment)] if environment else []
    options += ["--entrypoint-num-gpus", f"{gpus:g}"] if gpus else []
    options += ["--metadata-json", json.dumps(job["metadata"])]
    return f"{ray_job('submit', address)} {shlex.join(options)} -- {job['entrypoint']}"


def ray_job(action: str, address: str) -> str:
    """The beginning of a `ray job` command; what Ray would prefer to --address is unset for it."""
    unset = "".join(f"-u {name} " for name in ADDRESS_VARIABLES if os.environ.get(name))
    return f"{'env ' if unset else ''}{unset}ray job {action} --address {shlex.quote(address)}"


def check_stage(
    action: Action, module: str, arguments: list[str], folder: Path
) -> tuple[dict[str, str], dict[str, str]]:
    """What the stage reads, its config too, and what it writes: paths by key; raises InputError."""
    given = parse_arguments(module, arguments)
    if action == "evaluate":
        paths = {f"--{name}": given[name] for name in ("clip", "reference", "prompts_file")}
        paths |= {f"--features {f}": f.split("=", 1)[-1] for f in given["features"] or []}
        inputs = {name: str(path) for name, path in paths.items() if path is not None}
        return inputs, {"TARGET": str(given["target"])}
    file, overrides = str(given["config"]), given["overrides"] or []
    if not (folder / file).resolve().is_relative_to(folder):
        raise InputError(f"{file}: lies outside {folder}, which is what is uploaded")
    # The paths as given: once loaded, a relative one means this machine, not the upload.
    written = flatten(read_yaml(folder / file, overrides))
    inputs = {file: os.path.relpath(folder / file, folder)}
    inputs |= {key: path for key, path in written.items() if path and READ.fullmatch(key)}
    if action == "prepare":
        from data_prep.config import config_of

        prepare = config_of(read_yaml(folder / file, overrides), file)
        return inputs, {"output": prepare.output}
    from cluster.train_job import valid_sizes
    from pipeline.config import TrainConfig
    from pipeline.runs.start import load_stages

    if "workers" in given:
        trains = [load_config(TrainConfig, folder / file, overrides)]
        valid_sizes(trains[0], given["min_workers"] or given["workers"], given["workers"])
    else:
        trains = load_stages(folder / file, overrides)
    # A stage may begin with the run of one before it.
    runs = {train.run for train in trains}
    inputs = {key: path for key, path in inputs.items() if os.path.abspath(path) not in runs}
    return inputs, {"run": written["run"]}


def parse_arguments(module: str, arguments: list[str]) -> dict[str, Any]:
    """Arguments as the stage's own command reads them; raises InputError where it would not."""
    app = typer.Typer()
    app.command()(importlib.import_module(module).main)
    try:
        return typer.main.get_command(app).make_context(module, list(arguments)).params
    except UsageError as error:
        raise InputError(f"{module}: {error.format_message()}") from None  # pyright: ignore


def check_paths(inputs: dict[str, str], outputs: dict[str, str], folder: Path, names: set[str]):
    """Relative paths mean the uploaded folder: what is read must be in it, what is written be elsewhere."""
    for key, path in outputs.items():
        if "://" not in path and not os.path.isabs(path):
            raise InputError(
                f"{key}: got {path}, expected an absolute path on a disk that all nodes see: a relative one "
                f"lies in Ray's copy of the working directory. Remedy: {key}=/shared/{path}"
            )
    for key, path in inputs.items():
        if "://" in path or os.path.isabs(path):
            continue
        local = folder / path
        files = [local] if local.is_file() else [p for p in local.rglob("*") if p.is_file()]
        if not files:
            raise InputError(f"{key}: {local}: nothing there to upload; expected files")
        _require(key, files, folder, names)


def _require(key: str, files: list[Path], folder: Path, names: set[str]) -> None:
    """Raise InputError where some of the files would not be uploaded."""
    left = [p for p in files if os.path.relpath(p, folder) not in names]
    if left := [p for p in left if "__pycache__" not in p.parts]:
        raise InputError(
            f"{key}: {len(left)} files would not be uploaded ({left[0]}, ...), expected them in {folder} and "
            "not left out by .gitignore, .rayignore or excludes. Remedy: take the ignore line away, or give an "
            "absolute path on a disk that all nodes see"
        )


def uploaded(folder: Path, excludes: list[str]) -> set[str]:
    """Names of the files that Ray uploads of a folder; raises InputError where they are too many bytes."""
    # The Jobs SDK packs with the same function.
    from ray._private import ray_constants
    from ray._private.runtime_env.packaging import create_package

    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch) / "package.zip"
        create_package(
            str(folder),
            package,
            include_gitignore=os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE) != "1",
            excludes=ray_constants.get_runtime_env_default_excludes() + excludes,
            # Ray's own logger would report every ignore file.
            logger=logging.getLogger(__name__),
        )
        size = package.stat().st_size
        with zipfile.ZipFile(package) as archive:
            members = sorted(archive.infolist(), key=lambda m: -m.compress_size)
    if size > UPLOAD_LIMIT_BYTES:
        largest = ", ".join(f"{m.filename} ({m.compress_size >> 20} MiB)" for m in members[:3])
        raise InputError(
            f"{folder}: an upload of {size >> 20} MiB, expected no more than {UPLOAD_LIMIT_BYTES >> 20}; "
            f"largest: {largest}. Remedy: name them in {folder}/.rayignore"
        )
    return {member.filename for member in members}


def read_runtime_env(path: Path | None, folder: Path) -> dict[str, Any]:
    """Ray's runtime environment; raises InputError where it would carry a secret or another directory."""
    data = (yaml.safe_load(path.read_text()) or {}) if path else {}
    if "working_dir" in data:
        raise InputError(f"{path}: working_dir: got a value, expected --working-dir instead")
    for name in data.get("env_vars", {}):
        if any(word in name.upper() for word in SECRET):
            raise InputError(
                f"{path}: env_vars.{name}: looks like a secret, which anyone who sees the job could read. "
                "Remedy: set it on the nodes (a Kubernetes Secret, the scheduler's own store)"
            )
    return {**data, "working_dir": str(folder)}


def make_job(
    action: Action, arguments: list[str], folder: Path, runtime_env: dict[str, Any], gpus: float
) -> Job:
    """The job, once all that can be checked from here is right; raises InputError."""
    module = folder / (MODULES[action].replace(".", "/") + ".py")
    if not module.is_file():
        raise InputError(
            f"--working-dir: {folder} lacks {module.relative_to(folder)}, expected flowmill's checkout"
        )
    inputs, outputs = check_stage(action, MODULES[action], arguments, folder)
    names = uploaded(folder, runtime_env.get("excludes") or [])
    code = [path for package in PACKAGES for path in (folder / package).rglob("*.py")]
    _require("--working-dir", code, folder, names)
    check_paths(inputs, outputs, folder, names)
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    return {
        "entrypoint": shlex.join(["python", "-m", MODULES[action], *arguments]),
        "runtime_env": runtime_env,
        "metadata": {"stage": action, "commit": commit} | outputs,
        "entrypoint_num_gpus": gpus or None,
    }


def sbatch_line(action: Action, arguments: list[str], nodes: int) -> list[str]:
    """The sbatch command of a stage, its arguments checked; raises InputError."""
    script = Path(__file__).parent / "slurm" / f"{action}.sbatch"
    if not script.is_file():
        raise InputError(f"--launcher slurm: got {action}, expected prepare or train")
    # Slurm itself starts the ranks that Ray Train would start.
    module = "pipeline.train" if action == "train" else MODULES[action]
    # The job runs in this folder; absolute paths may be those of its nodes.
    inputs, _ = check_stage(action, module, arguments, Path.cwd())
    for key, path in inputs.items():
        if not ("://" in path or Path(path).exists() or os.path.isabs(path)):
            raise InputError(f"{key}: {path}: no such file or folder in {Path.cwd()}")
    return ["sbatch", f"--nodes={nodes}", str(script), *arguments]


class Cluster:
    """Ray's job server; its refusals as InputError."""

    def __init__(self, address: str):
        from ray.job_submission import JobSubmissionClient

        parts = urlsplit(address)
        if parts.scheme not in ("http", "https"):
            raise InputError(
                f"--address: got {address}, expected the job server's URL, http://HEAD:8265"
            )
        if parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "localhost", "::1"):
            print(
                f"{address}: plain http, so that who listens on the way reads the token. Better: "
                f"ssh -L 8265:127.0.0.1:8265 {parts.hostname}, and no --address",
                file=sys.stderr,
            )
        # They would win over the address that was asked for.
        for name in ADDRESS_VARIABLES:
            os.environ.pop(name, None)
        self.address = address
        self.client = self.call(JobSubmissionClient, address)

    def call(self, function: Any, *arguments: Any, **options: Any) -> Any:
        """The answer; raises InputError where the server is not there or refuses us."""
        from ray.exceptions import AuthenticationError

        try:
            return function(*arguments, **options)
        except AuthenticationError:
            raise InputError(
                f"{self.address}: refused the token. Remedy: RAY_AUTH_MODE=token and, in RAY_AUTH_TOKEN or the "
                "file RAY_AUTH_TOKEN_PATH, what `ray get-auth-token` prints on the head"
            ) from None
        except ConnectionError:
            raise InputError(
                f"{self.address}: no job server answers. Remedy: start the cluster, or forward its port: "
                "ssh -L 8265:127.0.0.1:8265 HEAD"
            ) from None

    def follow(self, name: str) -> int:
        """Print what the job prints to its end; returns its exit status. Ctrl-C leaves the job running."""
        try:
            asyncio.run(self._tail(name))
        except KeyboardInterrupt:
            print(f"\n{name} goes on", file=sys.stderr)
            return 130
        details = self.call(self.client.get_job_info, name)
        print(f"{name}: {details.status.value}: {details.message}", file=sys.stderr)
        if details.status.value == "SUCCEEDED":
            return 0
        return details.driver_exit_code or 1

    async def _tail(self, name: str) -> None:
        """A dropped connection is taken up where it broke: each begins with the whole log."""
        from aiohttp import ClientError

        shown = 0
        while True:
            seen, whole = 0, True
            try:
                async for text in self.client.tail_job_logs(name):
                    print(text[max(shown - seen, 0) :], end="", flush=True)
                    seen += len(text)
                    shown = max(shown, seen)
            except (RuntimeError, OSError, ClientError) as error:
                print(f"log connection lost ({error}); trying again", file=sys.stderr)
                whole = False
            if self.call(self.client.get_job_status, name).is_terminal() and whole:
                return
            await asyncio.sleep(1.0)


def main(
    action: Annotated[Action, typer.Argument(help="the stage")],
    arguments: Annotated[
        list[str], typer.Argument(help="the stage's own, such as CONFIG --workers 8")
    ],
    address: Annotated[
        str, typer.Option(envvar=ADDRESS_VARIABLES[0], help="of the job server")
    ] = "http://127.0.0.1:8265",
    name: Annotated[str | None, typer.Option(help="the job's name; default: Ray makes one")] = None,
    working_dir: Annotated[Path, typer.Option(help="what is uploaded")] = Path(),
    runtime_env: Annotated[
        Path | None, typer.Option(help="YAML of Ray's runtime environment")
    ] = None,
    gpus: Annotated[float, typer.Option(help="that the command itself needs (evaluate)")] = 0.0,
    launcher: Annotated[Literal["ray", "slurm"], typer.Option(help="what starts the job")] = "ray",
    nodes: Annotated[int, typer.Option(help="of a Slurm job")] = 1,
    follow: Annotated[bool, typer.Option(help="print what the job prints, to its end")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check; print the command")] = False,
) -> None:
    """Run a stage on a cluster; with Ray, follow it to its end and exit as it does."""
    if launcher == "slurm":
        line = sbatch_line(action, arguments, nodes)
        print(shlex.join(line), flush=True)
        sys.exit(0 if dry_run else subprocess.run(line).returncode)
    folder = working_dir.resolve()
    job = make_job(action, arguments, folder, read_runtime_env(runtime_env, folder), gpus)
    if dry_run:
        print(command_line(job, address))
        return
    attending = [ray_job(action, address) for action in ("logs --follow", "status", "stop")]
    cluster = Cluster(address)
    own_name: str = cluster.call(cluster.client.submit_job, submission_id=name, **job)
    print(f"{own_name}: submitted to {address}", file=sys.stderr)
    print(*(f"  {line} {own_name}" for line in attending), sep="\n", file=sys.stderr)
    sys.exit(cluster.follow(own_name) if follow else 0)


if __name__ == "__main__":
    # What is not an option here is the stage's.
    run_command(main, "cluster/README.md", context_settings={"ignore_unknown_options": True})
