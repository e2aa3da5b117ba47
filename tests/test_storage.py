"""Reading with patience, and writing whole or not at all, on disks and stores."""

import errno
from pathlib import Path

import pytest

from data_prep import storage
from data_prep.decoder import Address, DecodePool, Probe, ProbeRequest
from data_prep.images import ImagesConfig, Rejected
from data_prep.shards import write_text
from data_prep.storage import delete, find_files, open_root, patient, read_bytes
from models.config import InputError
from tests.prep_factory import encoded, pixels
from tests.test_remote import server  # noqa: F401 - a fixture


@pytest.fixture
def hasty(monkeypatch) -> list[float]:
    """No waiting; the waits that there would have been."""
    waits: list[float] = []
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    return waits


def failing(error: Exception, times: int):
    """A read that fails so often, and the count of its calls."""
    calls: list[int] = []

    def read() -> str:
        calls.append(1)
        if len(calls) <= times:
            raise error
        return "data"

    return read, calls


def test_what_may_pass_is_tried_again_a_counted_number_of_times(hasty):
    read, calls = failing(OSError(errno.EIO, "Input/output error"), 4)
    assert patient(read) == "data"
    assert (len(calls), hasty) == (5, [1, 2, 4, 8])
    read, calls = failing(RuntimeError("of some store"), 99)
    with pytest.raises(OSError, match="5 attempts failed: RuntimeError"):
        patient(read)
    assert len(calls) == 5


@pytest.mark.parametrize("error", [FileNotFoundError(), PermissionError(), KeyError("a bug")])
def test_what_will_not_pass_is_not_tried_again(hasty, error):
    read, calls = failing(error, 1)
    with pytest.raises(type(error)):
        patient(read)
    assert (len(calls), hasty) == (1, [])


def test_a_picture_whose_store_fails_for_a_moment_is_no_reject(tmp_path, server):  # noqa: F811
    data = encoded(pixels(0))
    (tmp_path / "served" / "x.png").write_bytes(data)
    server.failures["x.png"] = 1
    pool = DecodePool(ImagesConfig(resolution=32, bucket_multiple=8), 1)
    address = Address(f"{server.url}/x.png", 0, len(data))
    assert isinstance(pool.submit(ProbeRequest(address)).result(), Probe)
    assert server.gets["x.png"] == 2
    gone = Address(f"{server.url}/gone.png", 0, 10)
    assert isinstance(rejected := pool.submit(ProbeRequest(gone)).result(), Rejected)
    assert rejected.reason == "unreadable"


def test_a_folder_in_a_store_is_written_listed_and_deleted_like_one_on_disk(tmp_path):
    for root in (tmp_path / "data", open_root("memory://bucket/data", "output")):
        for name in ("a.txt", "b/c.txt"):
            write_text(root / name, name)
        assert find_files(root) == {"a.txt": 5, "b/c.txt": 7}
        assert read_bytes(str(root / "b/c.txt"), 2, 5) == b"c.txt"
        with pytest.raises(OSError, match="got 5 bytes of 9"):
            read_bytes(str(root / "b/c.txt"), 2, 9)
        write_text(root / "a.txt", "new")
        assert (root / "a.txt").read_text() == "new"
        assert delete(root / "b") == 1
        assert find_files(root) == {"a.txt": 3}
        assert delete(root / "b") == 0


def test_a_scheme_that_nothing_speaks_is_an_error_that_names_the_option():
    with pytest.raises(InputError, match=r"output: nosuch://x: .*nosuch"):
        open_root("nosuch://x", "output")
    assert open_root("here", "output") == Path("here").absolute()
