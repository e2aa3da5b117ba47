"""Every benchmark of the pipeline's parts, one after another, and one table: `make bench`."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

# What each figure is a ratio to; a name that ends in _s is seconds.
BENCHMARKS = {
    "loader": "webdataset, megatron-energon, a memory copy",
    "prepare": "a bare loop, multiprocessing.Pool",
    "model": "diffusers' class",
    "step": "a bare DeepSpeed loop, a bare torch loop",
}


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
    table = Table("benchmark", "against", "figure", "value", title="flowmill beside its peers")
    for name, found in figures.items():
        for key, value in found.items():
            table.add_row(name, BENCHMARKS.get(name, ""), key, f"{value:,.3f}")
    Console().print(table)
    if output is not None:
        output.write_text(json.dumps(figures, indent=1) + "\n")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
