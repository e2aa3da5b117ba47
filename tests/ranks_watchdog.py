"""A rank of a loop of collectives under the watchdog: `ranks_watchdog HARM RANK`, RANK being where HARM happens."""

import os
import sys
import time

import torch
import torch.distributed as dist

from pipeline import distributed
from pipeline.distributed.watchdog import Watchdog


def sleep_for_ever() -> None:
    time.sleep(10_000)


def main() -> None:
    harm, where = sys.argv[1], int(sys.argv[2])
    dist.init_process_group("gloo")
    print(f"pid {distributed.rank()} {os.getpid()}", flush=True)
    # What is not to be found first is far off, however busy the machine.
    silence_s, stuck_s = (10, 4) if harm == "hang" else (5, 60)
    with Watchdog(silence_s, stuck_s) as watchdog:
        for step in range(1, 20 if harm == "none" else 100_000):
            dist.all_reduce(torch.ones(10))
            watchdog.alive(step)
            time.sleep(0.02)
            if distributed.rank() == where and step == 10:
                if harm == "raise":
                    raise ValueError("no good")
                if harm == "hang":
                    sleep_for_ever()
            if step == 10 and distributed.is_main():
                print("step 10/", flush=True)
        dist.barrier()
    distributed.stop()


if __name__ == "__main__":
    main()
