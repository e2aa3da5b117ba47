"""Ranks: joining the process group, agreeing, leaving it. Everything else is left to DeepSpeed."""

import datetime
import os
import sys
import threading
import time

import numpy as np
import torch
import torch.distributed as dist


def rank() -> int:
    """This process's number among all ranks; 0 where it is alone."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    return rank() == 0


def say(message: str) -> None:
    """One line to the terminal, from rank 0."""
    if is_main():
        print(message, flush=True)


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
    """This rank's device, after joining the launcher's process group, or one of its own."""
    device = own_device()
    use_gpu = device.type == "cuda"
    if not use_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if not use_gpu:
        # DeepSpeed would compile an operator for ranks that share memory; gloo needs no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        # Port 0 is whichever is free.
        os.environ.update(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"})
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
    """Exit when the launcher dies: after its SIGKILL the ranks would run on as orphans."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        sys.stderr.write(f"rank {rank()}: the launcher is gone; leaving\n")
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

    def any(self, step: int, *mine: bool) -> tuple[bool, ...]:
        """Whether any rank said yes to each question at the last call; alone, it is the current call.

        Raises RuntimeError where ranks are at different steps. Collective.
        """
        if self.group is None:
            self.everyones_seconds[0] = self.seconds
            return mine
        answers = (False,) * len(mine)
        if self.pending is not None:
            values, work = self.pending
            work.wait()
            if values[0] != -values[1]:
                raise RuntimeError(
                    f"ranks are at different steps: {-values[1]:.0f} to {values[0]:.0f}"
                )
            answers = tuple(bool(value) for value in values[2 : 2 + len(mine)])
            self.everyones_seconds = values[2 + len(mine) :].numpy()
        seconds = [0.0] * world_size()
        seconds[rank()] = self.seconds
        values = torch.tensor([step, -step, *map(float, mine), *seconds], dtype=torch.float64)
        work = dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group, async_op=True)
        assert work is not None
        self.pending = (values, work)
        return answers


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
