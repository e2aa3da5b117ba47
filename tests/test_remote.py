"""Shards behind fsspec: S3 on a loopback server, an unreliable HTTP server, and the bounded cache."""

import fcntl
import hashlib
import http.server
import itertools
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO

import pytest

from models.config import InputError, parse_config
from pipeline.data.cache import SUFFIXES, CacheFullError, ShardCache, ShardError
from pipeline.data.config import CacheConfig, DataConfig
from pipeline.data.loader import Loader
from tests import train_factory
from tests.forked import wait_until
from tests.shard_factory import Kind, make_dataset

SQUARE = (32, 32)
GIB = 1 << 30


class Server(http.server.ThreadingHTTPServer):
    """A folder over HTTP that counts requests and fails, waits or lies when told to."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.gets: Counter[str] = Counter()
        self.failures: Counter[str] = Counter()  # file name -> how many times still
        self.delay_s = 0.0
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        self.server.gets[name] += 1
        if self.server.failures[name]:
            self.server.failures[name] -= 1
            self.send_error(503)
            return
        if name.endswith(".tar"):
            time.sleep(self.server.delay_s)
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    server = Server(tmp_path / "served")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


def loader(url: str, cache: Path, max_gib: float = 1.0, attempts: int = 3, **options) -> Loader:
    section = {"path": str(cache), "max_gib": max_gib, "attempts": attempts}
    return Loader(
        DataConfig(path=url, cache=CacheConfig(**section), **options), global_batch=8, seed=1
    )


def numbers(loader: Loader, count: int, start: int = 0) -> list[list[int]]:
    batches = itertools.islice(loader.batches(start), count)
    return [batch.micro[:, 0].long().tolist() for batch in batches]


def wait_for_part(cache: Path) -> None:
    wait_until(lambda: list(cache.rglob("*.part")), 60)


def local(folder: Path, count: int) -> list[list[int]]:
    return numbers(Loader(DataConfig(path=str(folder)), global_batch=8, seed=1), count)


def test_a_dataset_on_s3_gives_the_same_batches(tmp_path, bucket):
    import s3fs

    folder = make_dataset(tmp_path / "data", [(SQUARE, 20)] * 5)
    s3fs.S3FileSystem(skip_instance_cache=True).put(str(folder), "bucket/data", recursive=True)
    remote = loader(f"{bucket}/data", tmp_path / "cache")
    assert numbers(remote, 20) == local(folder, 20)
    assert remote.empty_caption is not None
    remote.close()


def test_a_failing_store_is_asked_again_and_the_wait_is_counted(tmp_path, server):
    folder = make_dataset(tmp_path / "served", [(SQUARE, 20)] * 3)
    shards = [path.name for path in folder.glob("shards/*/*.tar")]
    server.failures.update(dict.fromkeys(shards, 1))
    remote = loader(server.url, tmp_path / "cache")
    assert numbers(remote, 10) == local(folder, 10)
    assert remote.wait_s > 0.9  # a second between the first and the second attempt
    assert not +server.failures


def test_a_store_that_keeps_failing_ends_with_the_name_of_the_shard(tmp_path, server):
    folder = make_dataset(tmp_path / "served", [(SQUARE, 20)] * 3)
    name = sorted(path.name for path in folder.glob("shards/*/*.tar"))[1]
    server.failures[name] = 1000
    with pytest.raises(ShardError, match=rf"{name}.*2 attempts failed.*503"):
        numbers(loader(server.url, tmp_path / "cache", attempts=2), 10)


def test_bytes_that_differ_from_the_table_are_never_used(tmp_path, server):
    folder = make_dataset(tmp_path / "served", [(SQUARE, 20)] * 2)
    victim = min(folder.glob("shards/*/*.tar"))
    data = bytearray(victim.read_bytes())
    data[5000] ^= 1
    victim.write_bytes(data)
    with pytest.raises(ShardError, match=rf"{victim.name}.*sha256 got"):
        numbers(loader(server.url, tmp_path / "cache", attempts=2), 10)
    assert server.gets[victim.name] == 2
    assert not list((tmp_path / "cache").rglob("*.part"))


def test_a_cached_file_that_was_damaged_is_fetched_again(tmp_path, server):
    folder = make_dataset(tmp_path / "served", [(SQUARE, 20)] * 2)
    before = loader(server.url, tmp_path / "cache")
    numbers(before, 10)
    before.close()
    cached = min((tmp_path / "cache").rglob("*.tar"))
    cached.write_bytes(b"x" * cached.stat().st_size)
    server.gets.clear()
    assert numbers(loader(server.url, tmp_path / "cache"), 10) == local(folder, 10)
    assert {name for name in server.gets if name.endswith(".tar")} == {cached.name}


def size_of(path: Path) -> int:
    """Bytes of a cached file; 0 if it was evicted since it was listed."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def test_the_cache_stays_within_its_bound_and_evicts_what_was_used_longest_ago(tmp_path, server):
    folder = make_dataset(tmp_path / "served", [(SQUARE, 100)] * 12, Kind({}))
    size = max(path.stat().st_size for path in folder.rglob("*.tar"))
    # One partition, windows of one shard: four shards hold the 256 samples read at once, one is to
    # come, and one is being left.
    bound = 6 * (size + 8192)
    options = {"canonical_partitions": 1, "window_shards": 1}
    remote = loader(server.url, tmp_path / "cache", bound / GIB, **options)
    expected = Loader(DataConfig(path=str(folder), **options), global_batch=8, seed=1)
    most = 0
    pairs = zip(itertools.islice(remote.batches(), 450), expected.batches(), strict=False)
    for batch, other in pairs:
        assert batch.micro.tolist() == other.micro.tolist()
        files = [p for p in (tmp_path / "cache").rglob("*") if p.suffix in SUFFIXES]
        most = max(most, sum(map(size_of, files)))
    assert most <= bound
    assert max(server.gets.values()) <= 5  # in three epochs, with what is read ahead of a fourth


class Letters(ShardCache):
    """A cache of so many bytes over served files of 1,000 times a letter each, opened by the letter."""

    def __init__(self, folder: Path, server: Server, max_bytes: int):
        for letter in "abcdefgh":
            (folder / "served" / f"{letter}.tar").write_bytes(letter.encode() * 1000)
        config = CacheConfig(path=str(folder / "cache"), max_gib=max_bytes / GIB, attempts=1)
        super().__init__(server.url, config, threading.Event())

    def file(self, letter: str) -> IO[bytes]:
        digest = hashlib.sha256(letter.encode() * 1000).hexdigest()
        return self.open(f"{letter}.tar", digest, 1000)[0]

    def held(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


def test_what_was_used_longest_ago_is_evicted_but_nothing_in_use(tmp_path, server):
    cache = Letters(tmp_path, server, 2500)
    for letter in "abac":
        cache.file(letter).close()
        time.sleep(0.02)  # longer than a tick of the file system's clock
    assert cache.held() == ["a.tar", "c.tar"]
    files = [cache.file(letter) for letter in "ac"]
    with pytest.raises(CacheFullError, match=r"b\.tar.*max_gib"):
        cache.file("b")
    assert [file.seek(0) or file.read(1) for file in files] == [b"a", b"c"]


def test_readers_that_compete_for_a_small_cache_all_get_the_right_bytes(tmp_path, server):
    wrong: list[object] = []
    # Four readers hold a file each; a fifth may be on its way out.
    caches = [Letters(tmp_path, server, 5000) for _ in range(4)]

    def reader(seed: int) -> None:
        cache = caches[seed]
        for name in random.Random(seed).choices("abcdefgh", k=25):
            try:
                with cache.file(name) as file:
                    file.seek(0)
                    if file.read() != name.encode() * 1000:
                        wrong.append(name)
            except ShardError as error:
                wrong.append(error)

    threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*.tar")) <= 5000
    assert server.gets.total() > 8  # so there was eviction


def test_no_shard_changes_its_name_while_the_cache_is_being_counted(tmp_path, server):
    cache = Letters(tmp_path, server, 1500)
    server.delay_s = 1.0
    reader = threading.Thread(target=lambda: cache.file("a").close())
    reader.start()
    wait_for_part(cache.top)
    with (cache.top / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as who makes room
        reader.join(2.0)
        assert [path.suffix for path in cache.folder.iterdir()] == [".part"]
    reader.join()
    assert cache.held() == ["a.tar"]


def test_a_killed_download_blocks_nothing_and_its_room_is_taken_back(tmp_path, server):
    cache = Letters(tmp_path, server, 1500)
    server.delay_s = 30
    code = (
        "import sys, threading; from pipeline.data.cache import CacheConfig, ShardCache\n"
        f"config = CacheConfig(path={str(tmp_path / 'cache')!r}, max_gib={1500 / GIB})\n"
        f"ShardCache({server.url!r}, config, threading.Event()).open('a.tar', '', 1000)"
    )
    child = train_factory.start("-c", code)
    wait_for_part(tmp_path / "cache")
    child.kill()
    child.wait()
    server.delay_s = 0
    cache.file("b")
    assert cache.held() == ["b.tar"]


def test_a_full_disk_ends_with_the_name_of_the_shard(tmp_path, server):
    """In a namespace of its own, the cache on a file system of 64 KiB."""
    make_dataset(tmp_path / "served", [(SQUARE, 60)])
    (tmp_path / "cache").mkdir()
    code = (
        "from tests.test_remote import *\n"
        f"numbers(loader({server.url!r}, Path({str(tmp_path / 'cache')!r}), attempts=2), 3)"
    )
    mount = f"mount -t tmpfs -o size=64k tmpfs {tmp_path / 'cache'}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this machine does not let a user mount a file system in a namespace")
    command = ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, code]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=os.environ)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert re.search(r"CacheFullError.*train-000000\.tar.*No space left on device", last)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"path": "s3://bucket/x"}, "is remote: give cache.path"),
        ({"path": "/x", "cache": {"path": "/c", "max_gib": 1}}, "cache has no effect"),
        ({"path": "/x", "datasets": {"a": {"path": "/a"}}}, "not both"),
    ],
)
def test_a_config_that_cannot_be_meant_is_refused(section, message):
    with pytest.raises(InputError, match=message):
        parse_config(DataConfig, section, "config")


def test_an_unknown_protocol_is_the_users_error(tmp_path):
    with pytest.raises(InputError, match="Protocol not known: nowhere"):
        loader("nowhere://bucket/data", tmp_path / "cache")
