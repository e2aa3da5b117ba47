"""What a run will take, before it is paid for: `flowmill plan CONFIG.yaml --gpus 64 --gpu H100`."""

from pathlib import Path
from typing import Annotated

import typer

from models.command import load_config, plain_console, run_command
from models.config import InputError
from pipeline.arguments import Overrides
from pipeline.config import TrainConfig
from pipeline.data.config import is_remote
from pipeline.training.config import GPUS


def main(
    config: Annotated[
        Path,
        typer.Argument(
            help="YAML file of a run; of a preparation: CONFIG --help has other options"
        ),
    ],
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(min=1, help="in all")] = 8,
    gpus_per_node: Annotated[int, typer.Option(min=1)] = 8,
    gpu: Annotated[str, typer.Option(help=", ".join(GPUS))] = "H100",
    gpu_memory: Annotated[float | None, typer.Option(help="GiB; by default the GPU's")] = None,
    mfu: Annotated[float, typer.Option(min=0.01, max=1, help="share of the peak reached")] = 0.4,
    within: Annotated[float, typer.Option(help="GB/s that a GPU sends within its node")] = 300.0,
    between: Annotated[float, typer.Option(help="GB/s that a node sends to others")] = 50.0,
    price: Annotated[float | None, typer.Option(help="of a GPU-hour")] = None,
    fit: Annotated[bool, typer.Option("--fit", help="print the best layout as overrides")] = False,
    pictures: Annotated[int | None, typer.Option(help="if nothing is prepared yet")] = None,
    resolution: Annotated[int, typer.Option(help="pixels, likewise")] = 256,
    downscale: Annotated[int, typer.Option(help="of the autoencoder, likewise")] = 8,
    text_tokens: Annotated[int, typer.Option(help="of a caption, likewise")] = 120,
) -> None:
    """Memory, steps, disk, bandwidth, hours and cost of a run, before it starts."""
    from pipeline.runs.planning import GIB, Machines, assumed_data, prepared_data, report

    parsed = load_config(TrainConfig, config, overrides or [])
    if gpu not in GPUS:
        raise InputError(f"--gpu: got {gpu!r}, expected one of {', '.join(GPUS)}")
    if parsed.training.global_batch % gpus:
        raise InputError(
            f"--gpus: got {gpus}, expected a divisor of training.global_batch, {parsed.training.global_batch}"
        )
    place = parsed.data.path or ""
    if pictures is None and place and not is_remote(place) and not Path(place).exists():
        raise InputError(
            f"{place}: no such dataset. Remedy: --pictures COUNT if none is prepared yet"
        )
    if pictures is None:
        data = prepared_data(parsed)
    else:
        data = assumed_data(pictures, resolution, downscale, text_tokens, parsed.model)
    memory = (gpu_memory or GPUS[gpu][1]) * GIB
    console = plain_console(110)
    machines = Machines(gpus, gpus_per_node, gpu, memory, mfu, price, within, between)
    best = report(parsed, data, machines, console)
    if fit and best is not None:
        checkpointing = str(best.checkpointing).lower()
        print(f"engine.zero_stage={best.stage} engine.micro_batch={best.micro_batch} model.gradient_checkpointing={checkpointing}")  # fmt: skip


if __name__ == "__main__":
    run_command(main, "pipeline/README.md#before-it-starts")
