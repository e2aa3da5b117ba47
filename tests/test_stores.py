"""A store that does not answer, or not us, ends a command with one message and makes a reject of no picture."""

import http.client
import http.server
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from data_prep import prepare, storage, verify
from data_prep.decoder import Address, DecodePool, Probe, ProbeRequest
from data_prep.images import ImagesConfig, Rejected
from data_prep.sources.folder import FolderSource
from data_prep.sources.source import read_entries
from data_prep.sources.table import TableSource
from data_prep.sources.tars import TarSource
from models.command import run_command
from models.config import InputError
from pipeline import show_data
from tests.prep_factory import encoded, fill_folder, pixels, sample_members, tar_bytes
from tests.test_storage import hasty  # noqa: F401 - a fixture
from tests.train_factory import environment

s3fs = pytest.importorskip("s3fs", reason="the s3 extra is not installed")

DENIED = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
ENDED = "<Error><Code>ExpiredToken</Code><Message>The token has expired</Message></Error>"
NO_BUCKET = "<Error><Code>NoSuchBucket</Code><Message>No such bucket</Message></Error>"
AWAY = "<Error><Code>ServiceUnavailable</Code><Message>Please try again</Message></Error>"


class Gate(http.server.ThreadingHTTPServer):
    """In front of a store: `answer` says what a path is answered with, None for what the store says."""

    answer: Callable[[str], tuple[int, str] | None] = staticmethod(lambda path: None)

    def __init__(self, port: int):
        super().__init__(("127.0.0.1", 0), Through)
        self.store = port


class Through(http.server.BaseHTTPRequestHandler):
    server: Gate
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if said := self.server.answer(self.path):
            status, data, headers = said[0], said[1].encode(), [("Content-Type", "text/xml")]
        else:
            store = http.client.HTTPConnection("127.0.0.1", self.server.store)
            store.request(self.command, self.path, body, dict(self.headers))
            found = store.getresponse()
            status, data, headers = found.status, found.read(), found.getheaders()
            store.close()
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        length = next((v for n, v in headers if n.lower() == "content-length"), len(data))
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def gate(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """The gate before `bucket`, through which s3fs goes from now on."""

    gate = Gate(int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]))
    threading.Thread(target=gate.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{gate.server_port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    s3fs.S3FileSystem.clear_instance_cache()
    yield gate
    gate.shutdown()
    s3fs.S3FileSystem.clear_instance_cache()


def ends_in_one_message(main: Callable[..., None], *words: str, monkeypatch, capsys) -> str:
    monkeypatch.setattr(sys, "argv", ["command", *words])
    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error ")
    assert "Remedy" in said
    return said


def write_yaml(path: Path, **content) -> str:
    path.write_text(yaml.safe_dump(content))
    return str(path)


def no_credentials(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")


def nobody_there(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")


def always(status: int, text: str) -> Callable[[Gate, pytest.MonkeyPatch], None]:
    def answer(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
        gate.answer = lambda path: (status, text)

    return answer


TROUBLES = {
    "NoCredentialsError": no_credentials,
    "EndpointConnectionError": nobody_there,
    "Forbidden|Access Denied": always(403, DENIED),
    "NoSuchBucket|no such|cannot write": always(404, NO_BUCKET),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_a_command_that_cannot_reach_a_store_ends_in_one_message_that_names_it(
    tmp_path,
    gate,
    hasty,  # noqa: F811
    monkeypatch,
    capsys,
    trouble,
):
    TROUBLES[trouble](gate, monkeypatch)
    s3fs.S3FileSystem.clear_instance_cache()
    pictures, url = fill_folder(tmp_path / "pictures", 2), "s3://bucket/folder"
    vae = {"vae": {"path": "pixels"}, "captions": {"empty": "keep"}}
    folder = {"kind": "folder", "path": str(pictures)}
    source = write_yaml(
        tmp_path / "s.yaml",
        sources={"a": {"kind": "folder", "path": url}},
        output=str(tmp_path / "out"),
        **vae,
    )
    output = write_yaml(tmp_path / "o.yaml", sources={"a": folder}, output=url, **vae)
    layer = write_yaml(
        tmp_path / "l.yaml",
        base=url,
        output=str(tmp_path / "l"),
        text_encoders={"x": {"path": "/x"}},
    )
    training = {"cache": {"path": str(tmp_path / "cache"), "max_gib": 1, "attempts": 1}}
    data = write_yaml(
        tmp_path / "t.yaml",
        data={"path": url, **training},
        model={"kind": "dit"},
        training={"images": 8, "global_batch": 8},
        run=str(tmp_path / "run"),
    )
    for main, words in (
        (verify.main, [url]),
        (prepare.main, [source]),
        (prepare.main, [output]),
        (prepare.main, [layer]),
        (show_data.main, [data]),
    ):
        said = ends_in_one_message(main, *words, monkeypatch=monkeypatch, capsys=capsys)
        assert url in said
        assert re.search(trouble, said), said


@pytest.mark.parametrize(
    "answer", [(403, DENIED), (400, ENDED), pytest.param((503, AWAY), marks=pytest.mark.slow)]
)
def test_a_file_that_a_store_does_not_give_is_a_reject_and_a_store_that_gives_nothing_is_an_end(
    gate,
    bucket,
    hasty,  # noqa: F811
    monkeypatch,
    answer,
):
    store, data = s3fs.S3FileSystem(), encoded(pixels(0))
    store.pipe({f"bucket/p/{i}.png": data for i in range(3)})
    store.pipe("bucket/p/t.tar", tar_bytes(sample_members(0)))
    store.pipe("bucket/p/2.txt", b"a picture")
    images = ImagesConfig(resolution=32, bucket_multiple=8)
    ask = [ProbeRequest(Address(f"s3://bucket/p/{i}.png", 0, len(data))) for i in range(3)]
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    # A child begins with the environment and the code as they are on disk: 15 s of attempts.
    pool = DecodePool(images, 1)
    gate.answer = lambda path: answer if "1.png" in path else None
    found = pool.submit_all(ask).result()
    assert [type(one) for one in found] == [Probe, Rejected, Probe]
    assert found[1].reason == "unreadable"
    gate.answer = lambda path: answer
    with pytest.raises(InputError, match=r"s3://bucket/p/0\.png: .*nor can its folder be looked"):
        pool.submit_all(ask).result()
    # So with what is read beside the pictures.
    tars = TarSource(kind="tars", path="s3://bucket/p")
    files = FolderSource(kind="folder", path="s3://bucket/p")
    gate.answer = lambda path: None
    entries = [
        next(entry for entry in source.entries("a") if entry.name == name)
        for source, name in ((tars, "t.tar"), (files, "2.png"))
    ]
    for entry, source in zip(entries, (tars, files), strict=True):
        gate.answer = lambda path: None
        assert [item.reason for item in read_entries([entry], source)] == [None]
        gate.answer = lambda path: (
            answer if path.partition("?")[0].endswith((".tar", ".txt")) else None
        )
        (item,) = read_entries([entry], source)
        assert item.reason in ("unreadable", "caption_unreadable")
        gate.answer = lambda path: answer
        with pytest.raises(InputError, match="nor can its folder be looked at"):
            list(read_entries([entry], source))


def test_a_row_that_names_what_cannot_be_is_a_reject_and_an_outage_is_an_end(
    tmp_path,
    gate,
    hasty,  # noqa: F811
    monkeypatch,
):
    monkeypatch.setattr(storage, "_served", set())
    s3fs.S3FileSystem().pipe("bucket/t/0.png", encoded(pixels(0)))
    gate.answer = lambda path: (403, DENIED) if path.startswith("/secret") else None
    fine, local = "s3://bucket/t/0.png", ["/\0/0.png", f"/tmp/{'x/' * 3000}0.png"]
    odd = ["s3://secret/x/0.png", "s3://none/0.png", "s3://Bad Timeout 503!/0.png"]
    odd += [f"s3://bucket/{'k' * 1100}/0.png", f"{'k' * 300}/0.png", "a\0b/0.png"]

    def reasons(folder: str, rows: list[str]) -> list[str | None]:
        with fsspec.open(f"{folder}/t.parquet", "wb") as file:
            pq.write_table(pa.table({"image": rows, "caption": ["x"] * len(rows)}), file)
        source = TableSource(kind="table", path=folder)
        (entry,) = (entry for entry in source.entries("a") if not entry.reason)
        return [item.reason for item in read_entries([entry], source)]

    for row in odd:
        assert reasons("s3://bucket/t", [row])[0], row
    assert all(reasons(str(tmp_path), local))
    assert reasons("s3://bucket/t", [fine, *odd[3:]])[0] is None
    # What has given something, and now gives nothing, is no row's fault.
    for answer in ((403, DENIED), (503, AWAY)):
        gate.answer = lambda path, answer=answer: (
            None if path.startswith("/bucket/t/t.") else answer
        )
        with pytest.raises(InputError, match="nor can its folder be looked at"):
            storage.size_of(fine)
        monkeypatch.setattr(storage, "_served", set())


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["scan", "encode"])
def test_a_preparation_whose_store_goes_away_goes_on_to_the_same_bytes(tmp_path, gate, stage):
    pictures = fill_folder(tmp_path / "pictures", 48)
    s3fs.S3FileSystem().put(f"{pictures}/", "bucket/p/", recursive=True)
    config = write_yaml(
        tmp_path / "c.yaml",
        sources={"a": {"kind": "folder", "path": "s3://bucket/p"}},
        vae={"path": "pixels"},
        images={"resolution": 32, "bucket_multiple": 8},
        samples_per_shard=8,
        output=str(tmp_path / "whole"),
    )

    def run(name: str) -> subprocess.CompletedProcess:
        words = [config, f"output={tmp_path / name}", "ray.num_actors=1"]
        command = [sys.executable, "-m", "data_prep.prepare", *words]
        return subprocess.run(command, env=environment(), capture_output=True, text=True)

    assert run("whole").returncode == 0
    asked, begin = Counter[str](), 10 if stage == "scan" else 58

    def answer(path: str) -> tuple[int, str] | None:
        asked["pictures"] += path.partition("?")[0].endswith((".png", ".jpg"))
        return (503, AWAY) if asked["pictures"] > begin else None

    gate.answer = answer
    ended = run("cut")
    assert ended.returncode == 2, ended.stderr
    assert "nor can its folder be looked at" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert (tmp_path / "cut" / "work" / "shard_list.parquet").is_file() == (stage == "encode")
    gate.answer = lambda path: None
    assert run("cut").returncode == 0
    files = [p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").glob("shards/**/*.*")]
    assert len(files) > 12
    for name in (*files, "rejects.parquet", "shards.parquet"):
        whole, cut = (tmp_path / folder / name for folder in ("whole", "cut"))
        assert whole.read_bytes() == cut.read_bytes(), name
