"""Our networks against diffusers' classes with the same weights, in turn in one run.

    python -m tests.benchmarks.model [--json FILE] [--size S] [--batch 4] [--threads 1]

Forward, and forward with backward: medians of wall and CPU seconds, peak memory beyond the weights. On a GPU
in bf16, eager and compiled by block, with MFU: FLOPs that torch counts (2 per multiply-add) over the rate of a
large matrix product measured here.
"""

import contextlib
import ctypes
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from models.command import run_command
from models.conditions import Conditions
from models.exchange import to_diffusers
from models.layers import compile_blocks
from models.networks import DiTConfig, MMDiTConfig, build_model
from pipeline.training.flops import ModelFlops

SIDE, TOKENS = 32, 64  # latent of a 256-pixel picture; text tokens
DATA: dict[str, Any] = {"latent_channels": 4, "text_dim": 768, "pooled_dim": 0}


def configs(size: str) -> dict[str, Any]:
    """The three pairs, of the same width, depth and heads."""
    hidden, depth, heads = DiTConfig.SIZES[size]
    shape = {"hidden_size": hidden, "depth": depth, "num_heads": heads}
    classes = DATA | {"text_dim": 0, "num_classes": 1000}
    return {
        "dit": DiTConfig(timestep_shift=1, **shape, **classes),
        "pixart": DiTConfig(modulation="shared", position_extent=16.0, **shape, **DATA),
        "mmdit": MMDiTConfig(**shape, **DATA | {"pooled_dim": 768}),
    }


def calls(config: Any, batch: int, device: torch.device) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of our forward and of diffusers', of the same values, timesteps and masks included."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    x_t, t = torch.randn(batch, 4, SIDE, SIDE, **options), torch.rand(batch, device=device)
    if config.num_classes:
        label = torch.arange(batch, device=device)
        theirs = {"hidden_states": x_t, "timestep": 1000 * t, "class_labels": label}
        return {"x_t": x_t, "t": t, "conditions": Conditions(label=label)}, theirs
    text = torch.randn(batch, TOKENS, config.text_dim, **options)
    pooled = mask = None
    theirs = {"hidden_states": x_t, "timestep": 1000 * t, "encoder_hidden_states": text}
    if config.pooled_dim:
        pooled = theirs["pooled_projections"] = torch.randn(batch, 768, **options)
    else:
        mask = torch.ones(batch, TOKENS, dtype=torch.bool, device=device)
        theirs["encoder_attention_mask"] = mask
    return {"x_t": x_t, "t": t, "conditions": Conditions(text, mask, pooled)}, theirs


def training_step(network: Any, given: dict[str, Any]) -> None:
    out = network(**given)
    out = out if isinstance(out, torch.Tensor) else out.sample
    out.float().square().mean().backward()
    network.zero_grad(set_to_none=True)


@torch.no_grad()
def forward(network: Any, given: dict[str, Any]) -> None:
    network(**given)


def seconds(run: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """The most memory that a call holds beyond what is held before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # so that nothing freed is counted as held
    Path("/proc/self/clear_refs").write_text("5")  # the kernel's high-water mark starts anew
    before = _resident("VmHWM")
    run()
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def matmul_flops(device: torch.device) -> float:
    """FLOP/s of a product of two 8192 x 8192 bf16 matrices."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    times = [seconds(lambda: torch.mm(a, a), device)[0] for _ in range(20)]
    return 2 * 8192**3 / median(times[5:])


def measure(
    config: Any, batch: int, rounds: int, device: torch.device, compiled: bool
) -> dict[str, dict[str, float]]:
    """{"ours", "diffusers"}: medians of seconds and bytes; the two take turns, the first round is not counted."""
    torch.manual_seed(0)
    model = build_model(config)
    theirs = to_diffusers(model, sample_size=SIDE)
    networks = {"ours": model.to(device), "diffusers": theirs.to(device)}
    if device.type == "cuda":
        networks = {name: network.bfloat16() for name, network in networks.items()}
    if compiled:
        compile_blocks(model)
        for block in theirs.transformer_blocks:
            block.compile(fullgraph=True)
    given = dict(zip(networks, calls(config, batch, device), strict=True))
    kinds = {"forward": forward, "step": training_step}
    samples: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for round_number in range(rounds + 1):
        for name, network in networks.items():
            for kind, function in kinds.items():
                taken = seconds(lambda f=function, n=network, g=given[name]: f(n, g), device)
                if round_number:
                    samples.setdefault((name, kind), []).append(taken)
    figures: dict[str, dict[str, float]] = {name: {} for name in networks}
    for (name, kind), pairs in samples.items():
        figures[name][f"{kind}_s"] = median(wall for wall, _ in pairs)
        figures[name][f"{kind}_cpu_s"] = median(cpu for _, cpu in pairs)
    for name, network in networks.items():
        run = lambda n=network, g=given[name]: training_step(n, g)  # noqa: E731
        figures[name]["peak_bytes"] = peak_bytes(run, device)
    return figures


def main(
    size: Annotated[str, typer.Option(help="of DiT's table")] = "S",
    batch: Annotated[int, typer.Option(min=1)] = 4,
    rounds: Annotated[int, typer.Option(min=5)] = 7,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    output: Annotated[Path | None, typer.Option("--json", help="write the figures here")] = None,
) -> None:
    """Time every pair and table it; keys x_diffusers_* are diffusers' time over ours, forward and backward."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    ceiling = matmul_flops(device) if on_gpu else 0.0
    title = f"size {size}, {SIDE}x{SIDE} latents, batch {batch}, {device}" + (" bf16" * on_gpu)
    table = Table(title=title)
    columns = ["network", "forward s", "forward+backward s", "CPU s", "peak MiB"]
    for column in (*columns, *(["MFU"] if on_gpu else [])):
        table.add_column(column, justify="left" if column == "network" else "right")
    flat: dict[str, float] = {}
    for name, config in configs(size).items():
        flops = 0.0
        if on_gpu:
            flops = batch * ModelFlops(config).picture(SIDE, SIDE, TOKENS if config.text_dim else 0)
        for compiled in (False, True) if on_gpu else (False,):
            figures = measure(config, batch, rounds, device, compiled)
            mode = "_compiled" if compiled else ""
            for who, values in figures.items():
                mfu = flops / values["step_s"] / ceiling if on_gpu else 0.0
                cells = [f"{values[k]:.3f}" for k in ("forward_s", "step_s", "step_cpu_s")]
                cells += [f"{values['peak_bytes'] / 2**20:.0f}"] + [f"{mfu:.1%}"] * on_gpu
                table.add_row(f"{name}{mode} {who}", *cells)
                if on_gpu:
                    flat[f"mfu_{name}{mode}_{who}"] = mfu
            ours, theirs = figures["ours"], figures["diffusers"]
            for kind, suffix in (("step", ""), ("forward", "_forward")):
                key = f"x_diffusers_{name}{mode}{suffix}"
                flat[key] = theirs[f"{kind}_s"] / ours[f"{kind}_s"]
                flat[f"{key}_cpu"] = theirs[f"{kind}_cpu_s"] / ours[f"{kind}_cpu_s"]
            flat[f"memory_ratio_{name}{mode}"] = ours["peak_bytes"] / theirs["peak_bytes"]
    if on_gpu and size == "XL":
        flat["mfu_dit_xl_2_256"] = flat["mfu_dit_compiled_ours"]
    console = Console(width=110)
    console.print(table)
    for key, value in flat.items():
        console.print(f"{key} {value:.3f}")
    if output is not None:
        output.write_text(json.dumps(flat, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
