"""Decoding in child processes, one per thread, with limits on memory and time.

A picture can crash or hang the C libraries that read it. The child dies by its own alarm clock or
limit, the parent counts the attempt, and the neighbours never notice.
"""

import hashlib
import os
import resource
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from data_prep.images import Bucket, ImagesConfig, Picture, Rejected, decode, perceptual_hash, probe
from data_prep.storage import is_remote, read_bytes, refuse_away, said_of
from models.config import InputError

# Seconds for attempts at a remote file, on top of the time for decoding.
READING_S = 60
# An innocent picture may lose its child to an outside kill, but hardly three times.
ATTEMPTS = 3


@dataclass(frozen=True)
class Address:
    """Where a picture's bytes lie, or the bytes themselves where nothing else holds them."""

    path: str
    offset: int
    length: int
    data: bytes | None = None
    named: bool = False
    """By a row of a table, and not found where it lies."""


@dataclass(frozen=True)
class Probe:
    """What the scan learns of a picture: sha256 of its bytes, its size as seen, its looks where asked."""

    content_hash: bytes
    height: int
    width: int
    perceptual_hash: int | None = None


@dataclass(frozen=True)
class ProbeRequest:
    address: Address
    perceptual_hash: bool = False
    """Hash the pixels too, which needs decoding; the rest is in the header."""


@dataclass(frozen=True)
class DecodeRequest:
    """Refused if the bytes are no longer those that a scan saw; None: there was none."""

    address: Address
    content_hash: bytes | None
    bucket: Bucket
    crop_at: tuple[float, float]


Request = ProbeRequest | DecodeRequest
Answer = Probe | Picture | Rejected


class DecodePool:
    """`num_children` processes that answer requests; Futures in, in any order."""

    def __init__(self, config: ImagesConfig, num_children: int):
        self._config = config
        self._local = threading.local()
        self._threads = ThreadPoolExecutor(num_children, thread_name_prefix="decode")

    def submit(self, request: Request) -> "Future[Answer]":
        return self._threads.submit(lambda: self._answers([request])[0])

    def submit_all(self, requests: Sequence[Request]) -> "Future[list[Answer]]":
        """Several at once: a message to the child and one back cost more than a header."""
        return self._threads.submit(self._answers, requests)

    def _answers(self, requests: Sequence[Request]) -> list[Answer]:
        death = 0
        for _ in range(ATTEMPTS if len(requests) == 1 else 1):
            try:
                return self._ask(requests) if requests else []
            except ChildProcessError as error:
                death = error.errno
        if len(requests) > 1:
            # Alone each shows whether it is the one that kills its child.
            return [answer for request in requests for answer in self._answers([request])]
        reason, detail = "decode_crash", f"exit status {death}"
        if death == -signal.SIGALRM:
            reason, detail = "decode_timeout", f"over {self._config.timeout_s} s"
            for request in requests:
                refuse_away(request.address.path, detail, request.address.named)
        return [Rejected(reason, f"{detail}, {ATTEMPTS} times")]

    def _ask(self, requests: Sequence[Request]) -> list[Answer]:
        """The answers of this thread's child; raises ChildProcessError with the status that it died with, InputError."""
        if not hasattr(self._local, "child"):
            self._local.child = _start_child(self._config)
        pipe, process = self._local.child
        try:
            pipe.send(requests)
            answers: list[Any] = pipe.recv()
        except (EOFError, OSError) as error:
            del self._local.child
            pipe.close()
            raise ChildProcessError(process.wait(), "died") from error
        for answer in answers:
            if isinstance(answer, InputError):
                raise answer
        return answers


def _start_child(config: ImagesConfig) -> "tuple[Connection, subprocess.Popen[bytes]]":
    ours, theirs = Pipe()
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).resolve().parent.parent)!r});"
    code += "from data_prep.decoder import serve;"
    code += f"serve({theirs.fileno()}, {config.model_dump_json()!r})"
    # libtiff and libpng print to stderr.
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code],
        pass_fds=[theirs.fileno()],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    theirs.close()
    return ours, process


def serve(handle: int, settings: str) -> None:
    """Answer lists of requests until the parent goes; each under the alarm that kills this process."""
    pipe = Connection(handle)
    config = ImagesConfig.model_validate_json(settings)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # Ctrl-C is for the driver.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # About four copies of the largest picture allowed.
    memory = (2 << 30) + 16 * config.max_pixels
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    warnings.simplefilter("ignore")
    while True:
        try:
            requests: list[Request] = pipe.recv()
        except EOFError:
            return
        answers = list[Answer | InputError]()
        for request in requests:
            signal.alarm(config.timeout_s + READING_S * is_remote(request.address.path))
            try:
                answers.append(_work(request, config))
            except (Rejected, InputError) as error:
                answers.append(error)
            except MemoryError:
                answers.append(Rejected("decode_memory", f"over {memory >> 20} MiB"))
            signal.alarm(0)
        pipe.send(answers)


def _work(request: Request, config: ImagesConfig) -> Answer:
    address = request.address
    if address.length > config.max_bytes:
        raise Rejected("too_many_bytes", f"{address.length} > {config.max_bytes}")
    data = address.data
    if data is None:
        try:
            data = read_bytes(address.path, address.offset, address.length, address.named)
        except OSError as error:
            raise Rejected("unreadable", said_of(error)) from error
    # The time spent waiting for a store does not count against the picture.
    signal.alarm(config.timeout_s)
    content_hash = hashlib.sha256(data).digest()
    if isinstance(request, ProbeRequest):
        height, width = probe(data, config)
        looks = perceptual_hash(data, config) if request.perceptual_hash else None
        return Probe(content_hash, height, width, looks)
    if request.content_hash not in (None, content_hash):
        raise Rejected("changed_since_scan", "its bytes are no longer those that were scanned")
    return decode(data, request.bucket, config, request.crop_at)
