"""Ranks: joining the process group, agreeing, stopping on a signal. Everything else is DeepSpeed's."""

import datetime
import os
import socket
import sys
import threading
import time

import torch
import torch.distributed as dist


def rank() -> int:
    """This process's place among all ranks; 0 when there is one process."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def say(message: str) -> None:
    """One line to the terminal, from rank 0."""
    if is_main():
        print(message, flush=True)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(timeout_s: float) -> torch.device:
    """Join the process group that torchrun, Ray or Slurm describes; alone, a group of one on loopback.

    Returns this rank's device: a GPU where torch sees one, else the CPU.
    """
    use_gpu = torch.cuda.is_available()
    if not use_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if not use_gpu:
        # DeepSpeed would compile an op for ranks that share memory; gloo does without a compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone | {"MASTER_PORT": _free_port()})
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        deepspeed.init_distributed(
            dist_backend="nccl" if use_gpu else "gloo",
            timeout=datetime.timedelta(seconds=timeout_s),
            verbose=False,
        )
    if world_size() > 1:
        _die_with_parent()
    return device


def _die_with_parent() -> None:
    """Leave when the launcher dies: after SIGKILL of torchrun its workers would run on as orphans."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        sys.stderr.write(f"rank {rank()}: the launcher is gone; leaving\n")
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def join(timeout_s: float) -> torch.device:
    """This rank's device; under a launcher, in the group of its ranks."""
    if world_size() > 1:
        return start(timeout_s)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Exchange:
    """A yes or no of every rank on a few questions, once a step, without waiting.

    A call starts an exchange that the next one completes: all ranks see the same answers, a step late. It
    also checks that all ranks are at the same step: ranks that are not would pair up the wrong collectives
    long before they hung.
    """

    def __init__(self) -> None:
        # By gloo: a reduction on the GPU would wait for the step in flight.
        self.group = dist.new_group(backend="gloo") if world_size() > 1 else None
        self.pending: tuple[torch.Tensor, dist.Work] | None = None

    def any(self, step: int, *mine: bool) -> tuple[bool, ...]:
        """For each question whether a rank said yes at the last call. Collective.

        Alone, the answers are of now. Raises RuntimeError on uneven steps.
        """
        if self.group is None:
            return mine
        answers = (False,) * len(mine)
        if self.pending is not None:
            values, work = self.pending
            work.wait()
            if values[0] != -values[1]:
                raise RuntimeError(
                    f"ranks are at different steps: {-values[1]:.0f} to {values[0]:.0f}"
                )
            answers = tuple(bool(value) for value in values[2:])
        values = torch.tensor([step, -step, *map(float, mine)], dtype=torch.float64)
        work = dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group, async_op=True)
        assert work is not None
        self.pending = (values, work)
        return answers


def gather_objects(value: object) -> list:
    """Every rank's small picklable value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def stop() -> None:
    """Leave the group; without this, exit aborts now and then."""
    if dist.is_initialized():
        dist.destroy_process_group()
