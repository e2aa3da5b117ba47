"""Every benchmark, one after another, and one table of those with peers: `make bench`, 31 minutes on two cores."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

# Not objectives, which wants a dataset and hours.
BENCHMARKS = ("loader", "order", "decode", "prepare", "plan_scale", "scaling", "model", "step")
# Peer -> how the figures that compare with it begin; those of "over" are times of ours over theirs.
PEERS = {
    "webdataset": "x_webdataset_",
    "webdataset, tuned": "x_tuned_webdataset_",
    "megatron-energon": "x_energon_",
    "datasets": "x_datasets_",
    "LitData": "x_litdata_",
    "simplejpeg": "x_simplejpeg_",
    "PyTurboJPEG": "x_pyturbojpeg_",
    "shuffled copy": "of_shuffled_memcpy_",
    "memory copy": "of_memcpy_",
    "bare loop": "marginal_ratio_",
    "Pool(2)": "x_pool_",
    "diffusers": "x_diffusers_",
    "DeepSpeed": "over_deepspeed_",
    "torch": "over_torch_",
}


def beside_peers(figures: dict[str, dict[str, float]]) -> Table:
    """A row per case, a column per peer: how many times as fast ours is by the clock, and in CPU time."""
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for benchmark, found in figures.items():
        for key, value in found.items():
            bare = key.removeprefix("cpu_").removesuffix("_cpu")
            for peer, start in PEERS.items():
                if bare.startswith(start):
                    speed = 1 / value if start.startswith("over") else value
                    clock = "wall" if bare == key else "CPU"
                    case = f"{benchmark} {bare.removeprefix(start)}, {clock}"
                    rows.setdefault((benchmark, case), {})[peer] = speed
    peers = [peer for peer in PEERS if any(peer in row for row in rows.values())]
    table = Table("case", *peers, title="flowmill's speed over its peers'")
    for (_, case), row in sorted(rows.items()):
        table.add_row(case, *(f"{row[peer]:.2f}" if peer in row else "" for peer in peers))
    return table


def main(
    names: Annotated[list[str] | None, typer.Argument(help=", ".join(BENCHMARKS))] = None,
    output: Annotated[Path | None, typer.Option("--json", help="all figures")] = None,
) -> None:
    """Run benchmarks in turn on an otherwise idle machine; status 1 if one of them fails."""
    figures: dict[str, dict[str, float]] = {}
    failed = []
    for name in names or BENCHMARKS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "figures.json"
            module = [sys.executable, "-m", f"tests.benchmarks.{name}"]
            if subprocess.run([*module, "--json", str(path)]).returncode:
                failed.append(name)
            else:
                figures[name] = json.loads(path.read_text())
    Console(width=140).print(beside_peers(figures))
    if output is not None:
        output.write_text(json.dumps(figures, indent=1) + "\n")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
