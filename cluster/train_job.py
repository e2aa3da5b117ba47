"""Training inside a Ray job: `python -m cluster.train_job CONFIG.yaml [section.key=value ...] --workers N`.

Ray Train starts one rank per GPU and starts the group again from the last checkpoint when one of them fails.
"""

import os
import uuid
from typing import Annotated, Any

import ray
import typer
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

# Ray has no public way to say which sizes of an elastic group are good; `train` in the tests holds us to these.
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy
from ray.train.v2.api.exceptions import WorkerGroupError

from models.command import read_yaml, run_command
from models.config import InputError, parse_config
from pipeline.arguments import ConfigFile, Override, Overrides
from pipeline.config import TrainConfig
from pipeline.data.config import choose_partitions
from pipeline.loop import train_all
from pipeline.runs.setup import fit_run


def valid_sizes(config: TrainConfig, least: int, most: int) -> list[int]:
    """Numbers of ranks from `least` to `most` that share the global batch equally, in the same order.

    Raises InputError where `most` is not one of them, or `least` leaves no choice that it asks for.
    """
    batch, micro = config.training.global_batch, config.engine.micro_batch or 1
    partitions = choose_partitions(config.data.canonical_partitions, batch, 1)
    divisors = [n for n in range(1, partitions + 1) if partitions % n == 0]
    sizes = [n for n in divisors if batch // n % micro == 0]
    for option, size in (("--workers", most), ("--min-workers", least)):
        if size not in sizes:
            raise InputError(
                f"{option}: got {size}, expected one of {', '.join(map(str, sizes))}: what divides "
                f"data.canonical_partitions ({partitions}) and leaves each rank whole micro-batches of the "
                f"global batch of {batch}"
            )
    if least > most:
        raise InputError(f"--min-workers: got {least}, expected no more than --workers {most}")
    return [size for size in sizes if least <= size <= most]


class _ValidSizes(ElasticScalingPolicy):
    """As many ranks as there is room for, rounded down to a number that the batch can be shared by."""

    def __init__(self, scaling_config: ScalingConfig, sizes: list[int]):
        super().__init__(scaling_config)
        self._sizes = sizes

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        possible = super()._count_possible_workers(reserved_resources)
        return max((size for size in self._sizes if size <= possible), default=0)


class _Trainer(TorchTrainer):
    sizes: list[int]

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            parts["scaling_policy"] = _ValidSizes(self.scaling_config, self.sizes)
        return super()._initialize_and_run_controller(**parts)


def _rank(job: dict[str, Any]) -> None:
    """One rank's whole life; Ray has set RANK, WORLD_SIZE and the rest, and joined the group."""
    os.environ["FLOWMILL_JOB"] = job["name"]
    train_all([parse_config(TrainConfig, job["config"], "the job")], job["override"])


def fit(
    config: TrainConfig, sizes: list[int], scaling: ScalingConfig, max_failures: int, override: bool
) -> None:
    """Train on a group of the largest of `sizes` that there is room for; raises InputError."""
    # Ranks are to find relative paths where the job does: in the uploaded working directory.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    backend = "nccl" if scaling.use_gpu else "gloo"
    # One name for the group however often Ray starts it again.
    job = {"config": config.model_dump(mode="json"), "override": override, "name": uuid.uuid4().hex}
    failures = FailureConfig(max_failures=max_failures)
    trainer = _Trainer(
        _rank,
        train_loop_config=job,
        torch_config=TorchConfig(backend=backend, timeout_s=int(config.engine.timeout_s)),
        scaling_config=scaling,
        run_config=RunConfig(name="ray", storage_path=config.run, failure_config=failures),
    )
    trainer.sizes = sizes
    try:
        trainer.fit()
    except WorkerGroupError as error:
        causes = list(error.worker_failures.values())
        user = [c for c in (getattr(e, "cause", e) for e in causes) if isinstance(c, InputError)]
        if user:
            raise InputError(str(user[0])) from None
        raise


def main(
    config: ConfigFile,
    overrides: Overrides = None,
    workers: Annotated[int, typer.Option(help="ranks, one per GPU")] = 1,
    min_workers: Annotated[
        int | None, typer.Option(help="go on with as few after a loss; default: --workers")
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="ranks on CPUs")] = False,
    cpus_per_worker: Annotated[int, typer.Option(help="CPUs that each rank reserves")] = 1,
    max_failures: Annotated[int, typer.Option(help="restarts of the group; -1: no end")] = 3,
    resize_every_s: Annotated[
        float, typer.Option(help="how often a shrunk group may grow, from its last checkpoint")
    ] = 600.0,
    override: Override = False,
) -> None:
    """Train as a Ray job; run again to resume."""
    given = read_yaml(config, overrides or [])
    parsed = parse_config(TrainConfig, given, str(config))
    if not os.path.isabs(given["run"]):
        raise InputError(
            f"run: got {given['run']}, expected an absolute path on a disk that all nodes see: in a Ray job a "
            "relative one lies in a node's own copy of the working directory"
        )
    sizes = valid_sizes(parsed, min_workers or workers, workers)
    # The user's errors come to light before anything is started.
    fit_run(parsed).loader.close()
    if not ray.is_initialized():
        ray.init()
    scaling = ScalingConfig(
        num_workers=(sizes[0], sizes[-1]) if len(sizes) > 1 else sizes[-1],
        use_gpu=not cpu,
        resources_per_worker={"CPU": cpus_per_worker} | ({} if cpu else {"GPU": 1}),
        elastic_resize_monitor_interval_s=resize_every_s,
    )
    fit(parsed, sizes, scaling, max_failures, override)


if __name__ == "__main__":
    run_command(main, "cluster/README.md")
