"""Packs what training needs beside torch, for a machine with a GPU and without a network.

    python -m tests.benchmarks.pack FOLDER [--python 3.12]

FOLDER gets packages/ and flowmill/; there, PYTHONPATH=FOLDER/packages:FOLDER/flowmill. That machine is to have
torch, transformers, safetensors, numpy, pyarrow and tensorboard of its own.
"""

import importlib.metadata
import platform
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer
from packaging.requirements import Requirement

from models.command import run_command
from models.config import InputError

ROOT = Path(__file__).parents[2]
# What pipeline.train imports and such a machine may lack, then what its tests do.
PACKAGES = (
    "pydantic", "omegaconf", "hjson", "diffusers", "jaxtyping", "typer", "rich", "psutil", "pillow",
    "einops", "py-cpuinfo", "msgpack", "ninja", "beartype", "pytest", "pytest-xdist",
)  # fmt: skip
# They have no wheel, and nothing in them is compiled: as they are installed here.
COPIED = ("deepspeed", "antlr4-python3-runtime")
THERE = {"torch", "transformers", "safetensors", "numpy", "pyarrow", "tensorboard"}


def closure(names: tuple[str, ...], without: Collection[str] = THERE) -> dict[str, str]:
    """The installed packages of these names and of all that they require but `without`: name -> version."""
    found: dict[str, str] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found or name in without or name.startswith("nvidia"):
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            if name in PACKAGES:
                continue
            raise InputError(f"{name}: not installed here, expected what is to be packed") from None
        found[name] = distribution.version
        for requirement in map(Requirement, distribution.requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


def main(
    folder: Annotated[Path, typer.Argument(help="made, or filled up")],
    python: Annotated[str, typer.Option(help="version there")] = platform.python_version()[:4],
) -> None:
    """Pack the code and its packages; prints their size."""
    packages, code = folder / "packages", folder / "flowmill"
    packages.mkdir(parents=True, exist_ok=True)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    for name in listed.splitlines():
        (code / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, code / name)
    pins = [f"{n}=={v}" for n, v in closure(PACKAGES).items() if n not in COPIED]
    target = ["--target", str(packages), "--upgrade", "--python-version", python]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--only-binary", ":all:"]
    if subprocess.run([*pip, *target, *pins]).returncode:
        raise InputError(f"pip could not get wheels for Python {python}: see its message above")
    for name in COPIED:
        for file in importlib.metadata.files(name) or []:
            if ".." not in file.parts and "__pycache__" not in file.parts:
                (packages / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(str(file.locate()), packages / file)
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 2**20
    print(f"{folder}: {len(pins) + len(COPIED)} packages, {size:.0f} MiB")


if __name__ == "__main__":
    run_command(main)
