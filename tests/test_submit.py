"""Submitting: what is refused before anything is sent, and the command that is printed instead."""

import asyncio
import json
import shlex
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray
import yaml
from aiohttp import web

from cluster.submit import Action, Cluster, main, make_job, read_runtime_env
from models.command import load_config, run_command
from models.config import InputError
from pipeline.config import TrainConfig
from pipeline.runs.setup import fit_run
from tests import train_factory
from tests.ray_cluster import copy_checkout, free_port

TRAIN = "data: {path: /shared/data}\ntraining: {images: 1000, global_batch: 24}\nrun: /shared/run\n"
PREPARE = """
sources: {p: {kind: folder, path: /shared/pictures}}
vae: {path: models/demo_vae}
output: /shared/prepared
"""


@pytest.fixture(scope="module", autouse=True)
def configs(checkout) -> None:
    (checkout / "train.yaml").write_text(TRAIN)
    (checkout / "prepare.yaml").write_text(PREPARE)
    (checkout / "outputs").mkdir()
    (checkout / "outputs" / "hidden.yaml").write_text(TRAIN)


def refuse(checkout: Path, action: Action, *arguments: str) -> str:
    with pytest.raises(InputError) as caught:
        make_job(action, list(arguments), checkout, read_runtime_env(None, checkout), 0.0)
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train train.yaml run=runs/here", "run: got runs/here, expected an absolute path"),
        ("prepare prepare.yaml output=here", "output: got here, expected an absolute path"),
        ("train train.yaml data.path=tests/nothing", "nothing there to upload"),
        ("train train.yaml data.path=outputs", "1 files would not be uploaded"),
        ("prepare prepare.yaml vae.path=models/no", "vae.path: "),
        ("prepare prepare.yaml sources.p.path=tests/no", "sources.p.path: "),
        ("prepare prepare.yaml vision_encoder={path: models/no}", "vision_encoder.path: "),
        ("prepare prepare.yaml text_encoders.t={path: models/no}", "text_encoders.t.path: "),
        ("train train.yaml model.init_from=models/no", "model.init_from: "),
        ("train train.yaml start_from.run=runs/no", "start_from.run: "),
        ("train train.yaml encoders.vae=models/no", "encoders.vae: "),
        ("train train.yaml encoders.text.t=models/no", "encoders.text.t: "),
        ("train outputs/hidden.yaml", "would not be uploaded"),
        ("train ../elsewhere.yaml", "lies outside"),
        ("train train.yaml modle.size=L", "did you mean 'model'"),
        ("train train.yaml --workers 5", "--workers: got 5, expected one of 1, 2, 4, 8: what divides"),
        ("train train.yaml --workers 4 --min-workers 3", "--min-workers: got 3, expected one of"),
        ("train train.yaml --workers 4 --min-workers 8", "expected no more than --workers 4"),
        ("train train.yaml --wrokers 8", "No such option: --wrokers"),
        ("evaluate runs/here", "TARGET: got runs/here, expected an absolute path"),
        ("evaluate /run --clip models/no", "--clip: "),
        ("train", "Missing argument '"),
    ],
)  # fmt: skip
def test_what_could_not_run_is_refused_before_it_is_sent(checkout, arguments, message):
    action, *rest = arguments.replace(": ", ":\t").split(" ")
    assert message in refuse(checkout, action, *rest)


def test_code_that_an_ignore_line_would_keep_back_is_missed(tmp_path):
    folder = copy_checkout(tmp_path / "flowmill").resolve()
    (folder / "train.yaml").write_text(TRAIN)
    (folder / ".rayignore").write_text("models/\n")
    message = refuse(folder, "train", "train.yaml")
    assert "--working-dir: " in message
    assert "models/" in message


def test_an_upload_that_ray_would_not_take_is_refused_with_its_largest_files(checkout, monkeypatch):
    monkeypatch.setattr("cluster.submit.UPLOAD_LIMIT_BYTES", 1 << 20)  # the VAE alone has 1.5 MB
    message = refuse(checkout, "train", "train.yaml")
    assert "largest: models/demo_vae/diffusion_pytorch_model.safetensors" in message


def test_another_folder_than_a_checkout_is_refused(tmp_path):
    assert "lacks cluster/train_job.py, expected flowmill's checkout" in refuse(
        tmp_path.resolve(), "train", "train.yaml"
    )


def test_secrets_do_not_travel_in_the_runtime_environment(tmp_path):
    path = tmp_path / "env.yaml"
    path.write_text(yaml.safe_dump({"env_vars": {"AWS_SECRET_ACCESS_KEY": "x", "A": "b"}}))
    with pytest.raises(InputError, match=r"env_vars\.AWS_SECRET_ACCESS_KEY: looks like a secret"):
        read_runtime_env(path, tmp_path)
    path.write_text("working_dir: .\n")
    with pytest.raises(InputError, match="--working-dir instead"):
        read_runtime_env(path, tmp_path)


def run(monkeypatch, *arguments: str) -> int | str | None:
    """The command's exit status."""
    monkeypatch.setattr(sys, "argv", ["submit", *arguments])
    with pytest.raises(SystemExit) as caught:
        run_command(main, context_settings={"ignore_unknown_options": True})
    return caught.value.code


def test_the_printed_command_asks_for_the_same_job(checkout, tmp_path, monkeypatch, capsys):
    environment = tmp_path / "env.yaml"
    environment.write_text("env_vars: {NCCL_DEBUG: 'WARN it'}\n")
    arguments = ["train.yaml", "model.size=S", "--workers", "4", "--min-workers", "2"]
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:1")
    status = run(
        monkeypatch, "train", *arguments, "--dry-run", "--address", "http://head:8265",
        "--working-dir", str(checkout), "--runtime-env", str(environment),
    )  # fmt: skip
    assert status == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[:7] == ["env", "-u", "RAY_ADDRESS", "ray", "job", "submit", "--address"]
    options, entrypoint = words[: words.index("--")], words[words.index("--") + 1 :]
    assert entrypoint == ["python", "-m", "cluster.train_job", *arguments]
    assert options[options.index("--working-dir") + 1] == str(checkout)
    given = json.loads(options[options.index("--runtime-env-json") + 1])
    assert given == {"env_vars": {"NCCL_DEBUG": "WARN it"}}
    metadata = json.loads(options[options.index("--metadata-json") + 1])
    assert metadata["stage"] == "train"
    assert metadata["run"] == "/shared/run"


def test_where_no_job_server_answers_the_message_says_so(checkout, monkeypatch, capsys):
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    address = f"http://127.0.0.1:{free_port()}"
    evaluate = ["evaluate", "/run", "--working-dir", str(checkout), "--address"]
    assert run(monkeypatch, *evaluate, address) == 2
    assert f"{address}: no job server answers" in capsys.readouterr().err
    assert run(monkeypatch, *evaluate, "127.0.0.1:6379") == 2
    assert "expected the job server's URL" in capsys.readouterr().err


LOG = "one\ntwo\nthree\nfour\nfive\n"
# How much of the log each connection brings, whether it is then cut, and the job's state thereafter.
CONNECTIONS = [
    (LOG[:10], True, "RUNNING"),
    (LOG[:16], False, "RUNNING"),
    (LOG[:20], True, "FAILED"),
    (LOG, False, "FAILED"),
]


class JobServer:
    """What a Ray head answers while one job fails and its connections break, by Ray's own protocol."""

    def __init__(self):
        self.accepted = 0

    async def version(self, _: web.Request) -> web.Response:
        return web.json_response({"version": "4", "ray_version": ray.__version__})

    async def job(self, request: web.Request) -> web.Response:
        assert request.match_info["name"] == "job-1"
        state = CONNECTIONS[self.accepted - 1][2]
        about = {"type": "SUBMISSION", "entrypoint": "x", "message": "it broke"}
        return web.json_response(about | {"status": state, "driver_exit_code": 7})

    async def tail(self, request: web.Request) -> web.WebSocketResponse:
        text, is_cut, _ = CONNECTIONS[self.accepted]
        self.accepted += 1
        log = web.WebSocketResponse()
        await log.prepare(request)
        for begin in range(0, len(text), 7):
            await log.send_str(text[begin : begin + 7])
        if is_cut and request.transport:
            await asyncio.sleep(0.1)  # so that what was sent arrives
            request.transport.abort()
        await log.close()
        return log

    def serve(self, port: int) -> None:
        app = web.Application()
        app.router.add_get("/api/version", self.version)
        app.router.add_get("/api/jobs/{name}", self.job)
        app.router.add_get("/api/jobs/{name}/logs/tail", self.tail)
        web.run_app(app, host="127.0.0.1", port=port, handle_signals=False, print=None)


def test_a_followed_job_shows_its_log_once_through_broken_connections_and_gives_its_status(capsys):
    server, port = JobServer(), free_port()
    threading.Thread(target=server.serve, args=[port], daemon=True).start()
    while socket.socket().connect_ex(("127.0.0.1", port)):
        time.sleep(0.05)
    assert Cluster(f"http://127.0.0.1:{port}").follow("job-1") == 7
    shown = capsys.readouterr()
    assert shown.out == LOG
    assert shown.err.count("log connection lost") == 2
    assert "job-1: FAILED: it broke" in shown.err
    assert server.accepted == len(CONNECTIONS)


def test_slurms_command_is_printed_once_the_config_is_right(checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    slurm = ["--launcher", "slurm", "--nodes", "4", "--dry-run"]
    assert run(monkeypatch, "train", "train.yaml", "seed=1", *slurm) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[:2] == ["sbatch", "--nodes=4"]
    assert words[3:] == ["train.yaml", "seed=1"]
    assert subprocess.run(["bash", "-n", words[2]]).returncode == 0
    assert run(monkeypatch, "train", "train.yaml", "sead=1", *slurm) == 2
    capsys.readouterr()
    assert run(monkeypatch, "prepare", "prepare.yaml", "vae.path=models/no", *slurm) == 2
    assert "vae.path: models/no: no such file or folder" in capsys.readouterr().err
    (checkout / "staged.yaml").write_text(TRAIN + "stages: {small: {}, large: {seed: 1}}\n")
    assert run(monkeypatch, "train", "staged.yaml", "run=runs/new", *slurm) == 0
    assert run(monkeypatch, "evaluate", "/run", *slurm) == 2


def test_a_runs_folder_holds_no_secret_of_the_environment(tmp_path, monkeypatch):
    secrets = {"RAY_AUTH_TOKEN": "f00d" * 16, "AWS_SECRET_ACCESS_KEY": "beef" * 10}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    run = fit_run(load_config(TrainConfig, train_factory.write_config(tmp_path), []))
    run.record()
    run.loader.close()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"config.yaml", "environment.txt", "git.txt"}
    for path in files:
        assert not [name for name, value in secrets.items() if value.encode() in path.read_bytes()]
