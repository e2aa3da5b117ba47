"""Checkpoints that are whole or absent: a folder appears under its name only when every file is on disk.

    RUN/checkpoints/step_00001000/
      deepspeed/            each rank's masters, moments and EMA
      ema.safetensors       full fp32 weights, for sampling, evaluation and export; and every other
      raw.safetensors       average of the config's
      checkpoint.json       step, layout, and bytes and sha256 of every other file; written last
    RUN/checkpoints/latest  the newest one's name

Flipped bits load silently in torch files and safetensors alike, so every hash is checked first.
"""

import glob
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.config import Config, InputError
from pipeline import distributed
from pipeline.ema import WithEMA, full_weights

RECORD = "checkpoint.json"


class CheckpointConfig(Config):
    every_steps: int = Field(default=1000, gt=0)
    keep: int = Field(default=3, gt=0)  # the newest so many


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one step: a reader sees the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(
    run: Path,
    step: int,
    engine: Any,
    optimizer: WithEMA,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of `step`, then move `latest`; collective. `state` is JSON for the restart."""
    folder = step_folder(run, step)
    partial = folder.with_name(folder.name + ".partial")
    if distributed.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    distributed.barrier()
    engine.save_checkpoint(str(partial), tag="deepspeed", save_latest=False)
    for which in (*optimizer.decays, "raw"):
        weights = full_weights(engine, optimizer, which)
        if distributed.is_main():
            save_file(weights, partial / f"{which}.safetensors", metadata={"step": str(step)})
    distributed.barrier()
    # Each rank hashes its share of the files, and syncs them.
    names = sorted(str(p.relative_to(partial)) for p in partial.rglob("*") if p.is_file())
    mine = {}
    for name in names[distributed.rank() :: distributed.world_size()]:
        sync(partial / name)
        mine[name] = {"bytes": (partial / name).stat().st_size, "sha256": _sha256(partial / name)}
    files = {
        name: entry for part in distributed.gather_objects(mine) for name, entry in part.items()
    }
    if distributed.is_main():
        record = state | {
            "step": step,
            "world_size": distributed.world_size(),
            "zero_stage": engine.zero_optimization_stage(),
            "files": dict(sorted(files.items())),
        }
        write_text(partial / RECORD, json.dumps(record, indent=1))
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one, met on resuming before it
        partial.rename(folder)
        sync(folder.parent)
        write_text(folder.parent / "latest", folder.name + "\n")
        _prune(folder.parent, keep)
    distributed.barrier()
    return folder


def _prune(parent: Path, keep: int) -> None:
    for old in sorted(p.parent for p in parent.glob(f"step_*[0-9]/{RECORD}"))[:-keep]:
        shutil.rmtree(old)


def candidates(run: Path) -> list[Path]:
    """Checkpoints to try, best first: the one that `latest` names, then the others, newest first."""
    parent = run / "checkpoints"
    folders = sorted((p for p in parent.glob("step_*[0-9]") if p.is_dir()), reverse=True)
    pointer = parent / "latest"
    named = parent / pointer.read_text().strip() if pointer.is_file() else None
    return sorted(folders, key=lambda p: p != named)


def faults(folder: Path, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a checkpoint: files missing or changed; every `parts`-th file is looked at."""
    try:
        files = json.loads((folder / RECORD).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return [f"{folder / RECORD}: {type(error).__name__}: {error}"]
    found = []
    for name in sorted(files)[part::parts]:
        path = folder / name
        if not path.is_file():
            found.append(f"{path}: missing")
        elif (size := path.stat().st_size) != files[name]["bytes"]:
            found.append(f"{path}: got {size} bytes, expected {files[name]['bytes']}")
        elif _sha256(path) != files[name]["sha256"]:
            found.append(f"{path}: its bytes changed since it was written (sha256)")
    return found


def newest_sound(run: Path) -> Path | None:
    """The newest checkpoint whose every file is as written; None where there is none at all. Collective.

    Each damaged one is named and passed over. Raises InputError where all are damaged: starting from
    zero is the user's to say.
    """
    # One rank lists: a folder that another deletes meanwhile must not part the ranks.
    folders = distributed.gather_objects(candidates(run) if distributed.is_main() else None)[0]
    for folder in folders:
        mine = faults(folder, distributed.rank(), distributed.world_size())
        found = [fault for part in distributed.gather_objects(mine) for fault in part]
        if not found:
            return folder
        distributed.say(f"checkpoint passed over: {found[0]}")
    if folders:
        raise InputError(
            f"{run / 'checkpoints'}: none of {len(folders)} checkpoints is whole. Remedy: restore one "
            "from a backup, or delete the folder to start from step 0."
        )
    return None


def restore(run: Path, engine: Any) -> dict[str, Any] | None:
    """Load the newest sound checkpoint and return its record, or None at a run's start. Collective."""
    folder = newest_sound(run)
    if folder is None:
        return None
    record = json.loads((folder / RECORD).read_text())
    for key, got, remedy in (
        ("world_size", distributed.world_size(), "start as many ranks"),
        ("zero_stage", engine.zero_optimization_stage(), "set engine.zero_stage back"),
    ):
        if record[key] != got:
            raise InputError(
                f"{folder}: written with {key} {record[key]}, got {got}. Remedy: {remedy}."
            )
    path, _ = engine.load_checkpoint(str(folder), tag="deepspeed")
    assert path is not None, f"{folder}: DeepSpeed found nothing in it"
    return record


def save_weights(path: Path, weights: dict[str, Tensor], about: dict[str, str]) -> None:
    """Full weights that outlive their checkpoint, whole or absent, beside a file for `sha256sum -c`."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    save_file(weights, partial, metadata=about)
    sync(partial)
    write_text(path.with_name(path.name + ".sha256"), f"{_sha256(partial)}  {path.name}\n")
    partial.replace(path)
    sync(path.parent)


def check_weights(path: Path) -> None:
    """Raises InputError where a file of `save_weights` is missing or not as it was written."""
    recorded = path.with_name(path.name + ".sha256")
    if not path.is_file() or not recorded.is_file():
        raise InputError(f"{path}: it or its .sha256 is missing. Remedy: make or restore it.")
    if recorded.read_text().split()[0] != _sha256(path):
        raise InputError(f"{path}: its bytes changed since it was written (sha256)")


def made_weights(run: Path, which: str, step: int | None) -> list[Path]:
    """Averages made after training by that name, oldest first."""
    steps = "*" if step is None else f"{step:08d}"
    return sorted((run / "ema").glob(f"step_{steps}.{glob.escape(which)}.safetensors"))


def load_weights(run: Path, which: str, step: int | None = None) -> tuple[dict[str, Tensor], int]:
    """Full fp32 weights and their step, from the newest sound checkpoint or that of `step`.

    `which` is "raw", an average of the run's ("ema" is the first), or one that `flowmill ema` made.
    Raises InputError where there is none.
    """
    if made := made_weights(run, which, step):
        check_weights(made[-1])
        return load_file(made[-1]), int(made[-1].name.split(".")[0].removeprefix("step_"))
    if step is None:
        folder = newest_sound(run)
    else:
        folder = step_folder(run, step)
        if found := faults(folder):
            raise InputError(found[0])
    if folder is None:
        raise InputError(f"{run / 'checkpoints'}: no checkpoint yet. Remedy: flowmill train.")
    if not (path := folder / f"{which}.safetensors").is_file():
        names = sorted(p.stem for p in folder.glob("*.safetensors"))
        raise InputError(
            f"weights {which!r}: got a name that {folder} lacks, expected one of {names}, or one that "
            "`flowmill ema` made"
        )
    return load_file(path), json.loads((folder / RECORD).read_text())["step"]
