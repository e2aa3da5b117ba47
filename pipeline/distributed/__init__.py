"""Ranks: joining the process group, agreeing, leaving it. Everything else is left to DeepSpeed."""

import datetime
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import torch
import torch.distributed as dist

from models.config import InputError

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun, Ray Train and others set for every rank."""

PATIENCE_S = 10.0
"""How long rank 0 waits for the others before it says so."""

NOBODY_THERE = (
    "Remedy: start as many ranks, by torchrun for one; or, without a launcher, unset RANK WORLD_SIZE LOCAL_RANK "
    "LOCAL_WORLD_SIZE, which an earlier launcher left in the environment."
)


def rank() -> int:
    """This process's number among all ranks; 0 where it is alone."""
    return _place()[0]


def world_size() -> int:
    return _place()[1]


def _place() -> tuple[int, int]:
    """Rank and number of ranks; raises InputError where the environment names them in part or in vain."""
    number, count, *others = (os.environ.get(name, "") for name in LAUNCHER)
    if number in ("", "0") and count in ("", "1"):
        return 0, 1
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count) and all(others)):
        given = ", ".join(f"{name}={os.environ.get(name, '')}" for name in LAUNCHER)
        raise InputError(
            f"got {given} in the environment, expected all of them, RANK below WORLD_SIZE. {NOBODY_THERE}"
        )
    return int(number), int(count)


def is_main() -> bool:
    return rank() == 0


def say(message: str) -> None:
    """One line to the terminal, from rank 0."""
    if is_main():
        # It may be a file on a full disk, or a pipe that nobody reads any more.
        with suppress(OSError):
            print(message, flush=True)


def tell(message: str) -> None:
    """One line to stderr, from any rank, which goes on, or leaves, though nobody reads it any more."""
    with suppress(OSError, ValueError):
        sys.stderr.write(f"{message}\n")
        sys.stderr.flush()


@contextmanager
def beside(what: str) -> Iterator[None]:
    """Let work beside training fail where the disk refuses: it is said once, and training goes on."""
    try:
        yield
    except OSError as error:
        if what not in _refused:
            _refused.add(what)
            say(f"{what} cannot be written, training goes on: {error}")


_refused: set[str] = set()


def own_device() -> torch.device:
    """This rank's GPU where torch sees one, which becomes the calling thread's; else the CPU.

    A thread that asks CUDA for anything before would open a context on the first GPU for each rank.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def start(timeout_s: float) -> torch.device:
    """This rank's device, after joining the launcher's process group, or one of its own.

    Raises InputError where ranks that torchrun starts again would look for those that died (pytorch issue 135712).
    """
    names = ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_MAX_RESTARTS")
    kept, restarts = (os.environ.get(name, "0") for name in names)
    if kept == "True" and restarts != "0":
        raise InputError(
            f"torchrun --max-restarts: got {restarts}, expected 0 while its store keeps the addresses of dead ranks. "
            "Remedy: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, with --rdzv-backend=c10d or --standalone"
        )
    device = own_device()
    use_gpu = device.type == "cuda"
    if not use_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if not use_gpu:
        # DeepSpeed would compile an operator for ranks that share memory; gloo needs no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if world_size() == 1:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        # Port 0 is whichever is free.
        os.environ.update(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
    if not dist.is_initialized():
        # Of many ranks one that waits is enough to hear of, if it is there.
        patience_s = PATIENCE_S if is_main() else 6 * PATIENCE_S
        waiting = threading.Timer(patience_s, lambda: tell(_waiting()))
        waiting.daemon = True
        waiting.start()
        try:
            deepspeed.init_distributed(
                dist_backend="nccl" if use_gpu else "gloo",
                timeout=datetime.timedelta(seconds=timeout_s),
                verbose=False,
            )
        except dist.DistError as error:
            raise InputError(f"{_waiting()} Given up after {timeout_s:g} s: {error}") from error
        finally:
            waiting.cancel()
    if world_size() > 1:
        _die_with_parent()
    return device


def _waiting() -> str:
    place = ":".join(os.environ[name] for name in LAUNCHER[3:])
    return f"rank {rank()} waits for the others of {world_size()} at {place}. {NOBODY_THERE}"


def _die_with_parent() -> None:
    """Exit when the launcher dies: after its SIGKILL the ranks would run on as orphans."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        tell(f"rank {rank()}: the launcher is gone; leaving")
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def join(timeout_s: float) -> torch.device:
    """This rank's device, after joining the group where there are several ranks."""
    return start(timeout_s) if world_size() > 1 else own_device()


class Exchange:
    """Every rank's yes or no to a few questions, once per step, without waiting.

    A call starts an exchange that the next one completes: all ranks see the same answers, one step
    late. It also checks that all ranks are at the same step, because ranks at different steps would
    match up the wrong collectives long before they hang. Each rank's `seconds` of a step travel along.
    """

    def __init__(self) -> None:
        # gloo, because a reduction on the GPU would wait for the step in flight.
        self.group = dist.new_group(backend="gloo") if world_size() > 1 else None
        self.pending: tuple[torch.Tensor, dist.Work] | None = None
        self.seconds, self.everyones_seconds = 0.0, np.zeros(world_size())

    def any(self, step: int, *mine: bool, now: bool = False) -> tuple[bool, ...]:
        """Whether any rank said yes to each question at the last call; alone, or `now`, at this one too.

        Raises RuntimeError where ranks are at different steps. Collective.
        """
        if self.group is None:
            self.everyones_seconds[0] = self.seconds
            return mine
        answers = self._complete(len(mine))
        seconds = [0.0] * world_size()
        seconds[rank()] = self.seconds
        values = torch.tensor([step, -step, *map(float, mine), *seconds], dtype=torch.float64)
        work = dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group, async_op=True)
        assert work is not None
        self.pending = (values, work)
        if now:
            answers = tuple(map(max, answers, self._complete(len(mine))))
        return answers

    def _complete(self, count: int) -> tuple[bool, ...]:
        if self.pending is None:
            return (False,) * count
        (values, work), self.pending = self.pending, None
        work.wait()
        if values[0] != -values[1]:
            raise RuntimeError(f"ranks are at different steps: {-values[1]:.0f} to {values[0]:.0f}")
        self.everyones_seconds = values[2 + count :].numpy()
        return tuple(bool(value) for value in values[2 : 2 + count])


def gather_objects(value: object) -> list:
    """Every rank's value, small and picklable, in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def stop() -> None:
    """Leave the group; otherwise the interpreter's exit aborts now and then."""
    if dist.is_initialized():
        dist.destroy_process_group()
