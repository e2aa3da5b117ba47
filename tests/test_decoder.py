"""Decoding in processes that die: nothing hangs, nothing is lost but the picture that kills."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from data_prep.decoder import Address, DecodePool, DecodeRequest, Probe, ProbeRequest
from data_prep.images import ImagesConfig, Picture, Rejected
from tests.prep_factory import encoded, pixels

CONFIG = ImagesConfig(resolution=32, bucket_multiple=8)


def save(path: Path, data: bytes) -> Address:
    path.write_bytes(data)
    return Address(str(path), 0, len(data))


def hanging(path: Path) -> ProbeRequest:
    """A file whose opening never returns: a pipe that nobody writes to."""
    os.mkfifo(path)
    return ProbeRequest(Address(str(path), 0, 10))


def decode_request(pool: DecodePool, address: Address) -> DecodeRequest:
    probe = pool.submit(ProbeRequest(address)).result()
    assert isinstance(probe, Probe)
    return DecodeRequest(address, probe.content_hash, (32, 32), (0.5, 0.5))


def children() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if any("data_prep.decoder" in argument for argument in child.cmdline()):
                found.append(child)
    return found


def test_a_member_of_a_larger_file_is_probed_and_decoded(tmp_path):
    data = encoded(pixels(0, 50, 30))
    address = save(tmp_path / "x.bin", b"before" + data + b"after")
    address = Address(address.path, len(b"before"), len(data))
    pool = DecodePool(CONFIG, 1)
    probe = pool.submit(ProbeRequest(address)).result()
    assert isinstance(probe, Probe)
    assert (probe.height, probe.width) == (50, 30)
    picture = pool.submit(decode_request(pool, address)).result()
    assert isinstance(picture, Picture)
    assert picture.pixels.shape == (32, 32, 3)


@pytest.mark.parametrize(
    ("name", "length", "reason"),
    [("gone.png", 10, "unreadable"), ("short.png", 10**6, "unreadable"), (".", 10, "unreadable")],
)
def test_what_cannot_be_read_is_rejected(tmp_path, name, length, reason):
    (tmp_path / "short.png").write_bytes(encoded(pixels(0)))
    answer = DecodePool(CONFIG, 1).submit(ProbeRequest(Address(str(tmp_path / name), 0, length)))
    assert isinstance(rejected := answer.result(), Rejected)
    assert rejected.reason == reason


def test_bytes_that_changed_since_the_scan_are_not_taken(tmp_path):
    pool = DecodePool(CONFIG, 1)
    request = decode_request(pool, save(tmp_path / "x.png", encoded(pixels(0))))
    other = encoded(pixels(1))
    (tmp_path / "x.png").write_bytes(other.ljust(request.address.length, b"\0"))
    answer = pool.submit(request).result()
    assert isinstance(answer, Rejected)
    assert answer.reason == "changed_since_scan"


def test_a_file_over_the_limit_is_rejected_unread(tmp_path):
    with open(tmp_path / "x.png", "wb") as file:
        file.truncate(1 << 40)  # a sparse TiB
    answer = DecodePool(CONFIG, 1).submit(
        ProbeRequest(Address(str(tmp_path / "x.png"), 0, 1 << 40))
    )
    assert isinstance(rejected := answer.result(), Rejected)
    assert rejected.reason == "too_many_bytes"


def test_a_file_that_hangs_is_rejected_and_its_neighbours_are_not(tmp_path):
    pool = DecodePool(ImagesConfig(resolution=32, bucket_multiple=8, timeout_s=1), 2)
    quick = decode_request(pool, save(tmp_path / "quick.png", encoded(pixels(0))))
    requests = [quick, hanging(tmp_path / "slow.png"), quick, quick]
    answers = [pool.submit(request) for request in requests]
    kinds = [type(answer.result()) for answer in answers]
    assert kinds == [Picture, Rejected, Picture, Picture]
    assert isinstance(rejected := answers[1].result(), Rejected)
    assert rejected.reason == "decode_timeout"


@pytest.mark.parametrize("place", [0, 2, 4])
def test_of_requests_that_cross_together_one_that_kills_is_rejected_alone(tmp_path, place):
    pool = DecodePool(ImagesConfig(resolution=32, bucket_multiple=8, timeout_s=1), 1)
    sizes = [(40 + i, 50) for i in range(5)]
    requests = [
        ProbeRequest(save(tmp_path / f"{i}.png", encoded(pixels(i, *size))))
        for i, size in enumerate(sizes)
    ]
    requests[1] = ProbeRequest(save(tmp_path / "page.png", b"<html>"))
    requests[place] = hanging(tmp_path / "slow.png")
    answers = pool.submit_all(requests).result()
    for i, answer in enumerate(answers):
        if i in (1, place):
            assert isinstance(answer, Rejected)
            assert answer.reason == ("decode_timeout" if i == place else "undecodable")
        else:
            assert isinstance(answer, Probe)
            assert (answer.height, answer.width) == sizes[i]
    assert pool.submit_all([]).result() == []


@pytest.mark.slow
def test_decoding_that_takes_too_long_is_cut_off_within_the_c_library(tmp_path):
    """1.7 GB of pixels in a small file: seconds to decode, however fast the machine is."""
    image = Image.new("RGB", (24_000, 24_000))
    address = save(tmp_path / "slow.png", encoded(image, "PNG", compress_level=1))
    config = ImagesConfig(resolution=32, bucket_multiple=8, timeout_s=1, max_pixels=1 << 30)
    pool = DecodePool(config, 1)
    assert isinstance(rejected := pool.submit(decode_request(pool, address)).result(), Rejected)
    assert rejected.reason == "decode_timeout"


def test_a_child_killed_from_outside_costs_nothing(tmp_path):
    pool = DecodePool(CONFIG, 1)
    request = decode_request(pool, save(tmp_path / "x.png", encoded(pixels(0))))
    for _ in range(2):
        for child in children():
            child.send_signal(signal.SIGKILL)
        assert isinstance(pool.submit(request).result(), Picture)


def test_a_picture_whose_child_dies_every_time_is_rejected(tmp_path):
    already = {child.pid for child in children()}
    answer = DecodePool(CONFIG, 1).submit(hanging(tmp_path / "x.png"))
    killed: dict[int, float] = {}
    while not answer.done():
        for child in children():
            used = sum(child.cpu_times()[:2])
            if child.pid not in already and used == killed.get(child.pid):
                child.send_signal(signal.SIGKILL)  # it has started, and now hangs
            killed[child.pid] = used
        time.sleep(0.3)
    assert isinstance(rejected := answer.result(), Rejected)
    assert rejected.reason == "decode_crash"
    assert rejected.detail == "exit status -9, 3 times"


def test_memory_over_the_limit_rejects_the_picture_only(tmp_path):
    already = {child.pid for child in children()}
    pool = DecodePool(CONFIG, 1)
    large = save(tmp_path / "x.png", encoded(Image.new("RGB", (7900, 7900)), compress_level=1))
    request = decode_request(pool, large)
    (child,) = (child for child in children() if child.pid not in already)
    assert child.rlimit(psutil.RLIMIT_AS) == ((2 << 30) + 16 * CONFIG.max_pixels,) * 2
    limit = child.memory_info().vms + (100 << 20)  # its pixels alone are 187 MiB
    child.rlimit(psutil.RLIMIT_AS, (limit, limit))
    assert isinstance(rejected := pool.submit(request).result(), Rejected)
    assert rejected.reason == "decode_memory"
    assert child.is_running()
    small = decode_request(pool, save(tmp_path / "y.png", encoded(pixels(0))))
    assert isinstance(pool.submit(small).result(), Picture)


def test_children_go_with_their_parent(tmp_path):
    address = save(tmp_path / "x.png", encoded(pixels(0)))
    code = (
        "import sys, time; from data_prep.decoder import *;"
        "pool = DecodePool(ImagesConfig(), 1);"
        "pool.submit(ProbeRequest(Address(sys.argv[1], 0, int(sys.argv[2])))).result();"
        "print('ready', flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, address.path, str(address.length)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    assert parent.stdout
    assert parent.stdout.readline() == b"ready\n"
    (child,) = psutil.Process(parent.pid).children()
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    child.wait(timeout=10)
