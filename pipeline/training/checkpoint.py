"""Checkpoints, whole or absent: a folder gets its name when every file is on disk.

    RUN/checkpoints/step_00001000/
      rank_00000.safetensors   rank 0's pieces of weights, moments and averages (pieces.py)
      index.json               where each parameter's pieces are
      checkpoint.json          step, counters, and bytes and sha256 of every other file; written last
    RUN/checkpoints/latest     the newest one's name

Training waits only for a copy into CPU memory, which a thread of each rank writes to disk. Once all
ranks have written, rank 0 commits. Flipped bits would load silently, so every hash is checked first.
"""

import json
import re
import shutil
import time
from collections.abc import Callable, Container
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.config import InputError
from models.files import file_sha256, publish, sync, write_text, write_whole
from pipeline import distributed
from pipeline.training import pieces
from pipeline.training.clock import Clock
from pipeline.training.config import CheckpointConfig, EMAConfig, power_name
from pipeline.training.ema import WithEMA
from pipeline.training.pieces import INDEX, Index, Pieces

RECORD = "checkpoint.json"
FORMAT = 3
# Folders of a run.
CHECKPOINTS = "checkpoints"
EMA_SNAPSHOTS = "ema_snapshots"

Files = dict[str, dict[str, Any]]
"""Bytes and sha256 by name."""


def step_folder(parent: Path, step: int) -> Path:
    return parent / f"step_{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def step_folders(parent: Path, suffix: str = "") -> dict[int, Path]:
    """The folders that `step_folder` names, with this suffix, by step, the oldest first."""
    found: dict[int, Path] = {}
    for path in parent.iterdir() if parent.is_dir() else ():
        match = re.fullmatch(r"step_([0-9]+)" + re.escape(suffix), path.name)
        if match and path.is_dir() and path.stem == step_folder(parent, step := int(match[1])).name:
            found[step] = path
    return dict(sorted(found.items()))


def describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def write(path: Path, tensors: dict[str, Tensor]) -> Files:
    """Force what one rank saves to disk, and empty `tensors` to free their memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    tensors.clear()
    sync(path)
    return {path.name: describe(path)}


def commit(unfinished: Path, index: Index, record: dict[str, Any]) -> Path:
    """Turn a folder whose pieces are all on disk into a checkpoint."""
    folder = unfinished.with_suffix("")
    write_text(unfinished / INDEX, json.dumps(index))
    files = record["files"] | {INDEX: describe(unfinished / INDEX)}
    write_text(unfinished / RECORD, json.dumps(record | {"files": files}, indent=1))
    # A damaged checkpoint of the step is left over where the run resumed from an earlier one.
    shutil.rmtree(folder, ignore_errors=True)
    publish(unfinished, folder)
    write_text(folder.parent / "latest", folder.name + "\n")
    return folder


class Saver:
    """Saves while training goes on, one save at a time. Without a config it keeps all."""

    def __init__(
        self,
        parent: Path,
        config: CheckpointConfig | None = None,
        check: Callable[[], None] = lambda: None,
    ):
        """`check` raises InputError, on all ranks, where nothing may be written any more."""
        self.parent, self.config, self.check = parent, config, check
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[Files] | None = None
        self.index: Index = {}
        self.record: dict[str, Any] = {}
        # Whether the last save failed, and how long it kept training waiting.
        self.failed, self.stall_s = False, 0.0

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing."""
        return self.writing is not None and not self.writing.done()

    def save(
        self,
        step: int,
        engine: Any,
        optimizer: WithEMA,
        state: dict[str, Any],
        states: Container[str] | None = None,
    ) -> None:
        """Begin to save `states` of the optimizer, or all, and `state`, JSON. Collective."""
        begin = time.perf_counter()
        self.finish()
        self.check()
        self.record = state | {
            "format": FORMAT,
            "step": step,
            "world_size": distributed.world_size(),
            "optimizer": type(optimizer).__name__,
        }
        if distributed.is_main():
            shutil.rmtree(self._unfinished(), ignore_errors=True)
        # Nobody writes before the folder is empty.
        distributed.barrier()
        file, tensors, self.index = pieces.collect(engine, optimizer, states)
        self.writing = self.writer.submit(write, self._unfinished() / file, tensors)
        self.stall_s = time.perf_counter() - begin

    def finish(self) -> None:
        """Wait until all ranks have written, then commit, and set `failed`. Collective.

        A failed save leaves the previous checkpoint as it was, and training goes on.
        """
        if self.writing is None:
            return
        files, message = Files(), None
        try:
            files = self.writing.result()
        except (OSError, SafetensorError) as error:
            message = f"rank {distributed.rank()}: {str(error).splitlines()[0]}"
        self.writing = None
        self.check()
        everyone = distributed.gather_objects((files, message, self.index))
        if distributed.is_main():
            message = next((text for _, text, _ in everyone if text), None)
            if message := message or self._commit(everyone):
                shutil.rmtree(self._unfinished(), ignore_errors=True)
                free = shutil.disk_usage(self.parent.parent).free >> 20
                distributed.say(
                    f"checkpoint of step {self.record['step']} NOT saved: {message} ({free:,} MiB free in "
                    f"{self.parent}); the previous one stays"
                )
        self.failed = any(distributed.gather_objects(message))

    def _unfinished(self) -> Path:
        return step_folder(self.parent, self.record["step"]).with_suffix(".partial")

    def _commit(self, everyone: list[tuple[Files, str | None, Index]]) -> str | None:
        """Commit on rank 0; returns what went wrong, if anything."""
        files = {name: entry for part, _, _ in everyone for name, entry in part.items()}
        index = pieces.merged([index for _, _, index in everyone])
        try:
            folder = commit(self._unfinished(), index, self.record | {"files": files})
        except OSError as error:
            return str(error)
        if self.config is not None:
            prune(folder.parent, self.config)
        distributed.say(f"saved {folder}, for which training waited {self.stall_s:.2f} s")
        return None


def store_snapshots(
    run: Path, config: EMAConfig, clock: Clock, engine: Any, optimizer: WithEMA
) -> None:
    """Save all power-function averages as they are now, for `flowmill ema`. Collective."""
    saver = Saver(run / EMA_SNAPSHOTS)
    names = [power_name(sigma_rel) for sigma_rel in config.sigma_rels]
    state = {
        "sigma_rels": config.sigma_rels,
        "begun": [clock.ema_begun[name] for name in names],
        "images_seen": clock.images_learned,
    }
    saver.save(clock.step, engine, optimizer, state, names)
    saver.finish()


def prune(parent: Path, config: CheckpointConfig) -> None:
    """Delete all but the newest `keep` and those of every `keep_every_steps` steps."""
    whole = [step for step, folder in step_folders(parent).items() if (folder / RECORD).is_file()]
    for step in whole[: -config.keep]:
        if not config.keep_every_steps or step % config.keep_every_steps:
            _delete(step_folder(parent, step))


def _delete(folder: Path) -> None:
    """Delete a folder of ours; a link to where the user has put it, or one that will not go, stays."""
    if not folder.is_symlink():
        try:
            shutil.rmtree(folder)
        except OSError as error:
            distributed.say(f"{folder}: cannot be deleted: {error}")


def candidates(run: Path) -> list[Path]:
    """Checkpoints to try in order: the one that `latest` names, then the others, newest first."""
    parent = run / CHECKPOINTS
    folders, pointer = reversed(step_folders(parent).values()), parent / "latest"
    named = pointer.read_text(errors="replace").strip() if pointer.is_file() else None
    return sorted(folders, key=lambda p: p.name != named)


def newest_record(run: Path) -> dict[str, Any]:
    """What the newest checkpoint says of itself; of a run without one, that nothing is done."""
    for folder in candidates(run):
        if (folder / RECORD).is_file():
            return json.loads((folder / RECORD).read_text())
    return {"step": 0, "clock": {"images_seen": 0, "images_learned": 0}}


def faults(folder: Path) -> list[str]:
    """Missing and changed files of a checkpoint; each rank checks some. Collective.

    Raises InputError where another version of flowmill wrote it.
    """
    return [fault for part in distributed.gather_objects(_own_faults(folder)) for fault in part]


def _own_faults(folder: Path) -> list[str]:
    try:
        record = json.loads((folder / RECORD).read_text())
        files, version = record["files"], record.get("format", 1)
    except PermissionError:
        # Of somebody else's checkpoints none would be whole.
        raise
    except (OSError, ValueError, KeyError) as error:
        if folder.is_dir():
            return [f"{folder / RECORD}: {type(error).__name__}: {error}"]
        steps = ", ".join(map(str, step_folders(folder.parent))) or "no step"
        return [f"{folder}: no such checkpoint; there are those of {steps}"]
    if version != FORMAT:
        raise InputError(
            f"{folder}: got a checkpoint of format {version}, expected {FORMAT}. Remedy: export it with the version "
            "that wrote it (its commit is in the run's git.txt), and begin a new run with model.init_from."
        )
    found = []
    for name in sorted(files)[distributed.rank() :: distributed.world_size()]:
        path = folder / name
        if not path.is_file():
            found.append(f"{path}: missing")
        elif (size := path.stat().st_size) != files[name]["bytes"]:
            found.append(f"{path}: got {size} bytes, expected {files[name]['bytes']}")
        elif file_sha256(path) != files[name]["sha256"]:
            found.append(f"{path}: its bytes changed since it was written (sha256)")
    return found


def newest_sound(run: Path) -> Path | None:
    """The newest checkpoint whose files are all as written, if there is one. Collective.

    A damaged one is named and passed over. Raises InputError where all are damaged: only the user
    can decide to start from zero.
    """
    # Rank 0 lists for all: a folder that is deleted meanwhile must not make the ranks differ.
    folders = distributed.gather_objects(candidates(run) if distributed.is_main() else None)[0]
    for folder in folders:
        if not (found := faults(folder)):
            return folder
        distributed.say(f"checkpoint passed over: {found[0]}")
    if folders:
        raise InputError(
            f"{run / CHECKPOINTS}: none of {len(folders)} checkpoints is whole. Remedy: restore one "
            "from a backup, or delete the folder to start from step 0."
        )
    return None


def restore(run: Path, engine: Any, optimizer: WithEMA, **parts: Any) -> dict[str, Any] | None:
    """Load the newest sound checkpoint, if there is one; returns its record. Collective.

    `parts` of the run get what the record has under their names, by `load`.
    """
    if distributed.is_main():
        for left_over in step_folders(run / CHECKPOINTS, ".partial").values():
            _delete(left_over)
    folder = newest_sound(run)
    if distributed.is_main():
        _forget_after(run, step_of(folder) if folder else 0)
    if folder is None:
        return None
    record = json.loads((folder / RECORD).read_text())
    if record["optimizer"] != type(optimizer).__name__:
        raise InputError(
            f"{folder}: written by {record['optimizer']}, got {type(optimizer).__name__}, which cannot read its "
            "state. Remedy: a new run with start_from, which takes the weights only."
        )
    pieces.load(Pieces(folder), engine, optimizer)
    for name, part in parts.items():
        part.load(record[name])
    return record


def _forget_after(run: Path, step: int) -> None:
    """Delete the snapshots of steps that are lost, and put the averages made from them aside."""
    for number, folder in step_folders(run / EMA_SNAPSHOTS).items():
        if number > step:
            shutil.rmtree(folder)
            distributed.say(f"deleted {folder}: the run goes on from step {step}")
    for number, _, path in made_averages(run):
        if number > step:
            aside = path.rename(path.with_name(f"{path.name}.abandoned"))
            distributed.say(f"renamed to {aside}: the run goes on from step {step}")


def made_averages(run: Path) -> list[tuple[int, str, Path]]:
    """Step, name and file of each average that `flowmill ema` made, by step."""
    name = re.compile(r"step_([0-9]{8,})\.(ema_sigma_[^/]+)\.safetensors")
    matches = [(m, path) for path in (run / "ema").glob("*") if (m := name.fullmatch(path.name))]
    return sorted((int(m[1]), m[2], path) for m, path in matches)


def save_weights(path: Path, weights: dict[str, Tensor], about: dict[str, str]) -> None:
    """Write weights that outlive their checkpoint, and a file for `sha256sum -c`."""
    write_whole(path, partial(save_file, weights, metadata=about))
    write_text(path.with_name(path.name + ".sha256"), f"{file_sha256(path)}  {path.name}\n")


def read_weights(path: Path) -> dict[str, Tensor]:
    """What `save_weights` wrote; raises InputError where it is not as it was written."""
    recorded = path.with_name(path.name + ".sha256")
    if not recorded.is_file():
        raise InputError(f"{recorded}: missing. Remedy: make {path.name} again, or restore it.")
    if recorded.read_text().split()[0] != file_sha256(path):
        raise InputError(f"{path}: its bytes changed since it was written (sha256)")
    return load_file(path)


def load_weights(run: Path, which: str, step: int | None = None) -> tuple[dict[str, Tensor], int]:
    """Full fp32 weights and their step, from the newest sound checkpoint or that of `step`.

    `which` is "raw", an average of the run ("ema" is the first), or one that `flowmill ema` made.
    Raises InputError where there is none.
    """
    made = {number: path for number, name, path in made_averages(run) if name == which}
    if step is None:
        folder = newest_sound(run)
    elif found := faults(folder := step_folder(run / CHECKPOINTS, step)):
        if step not in made:
            raise InputError(found[0])
        folder = None
    names, at = list[str](), -1
    if folder is not None:
        stored, at = Pieces(folder), step_of(folder)
        names = [state for state in stored.states if pieces.is_weights(state)]
        if which in names:
            return {name: stored.whole(which, name) for name in stored.shapes}, at
    newest = max(made, default=-1) if step is None else step
    if newest in made and newest >= at:
        return read_weights(made[newest]), newest
    if newest in made:
        raise InputError(
            f"{made[newest]}: was made at step {newest}, and the newest checkpoint is of step {at}. Remedy: "
            f"--step {newest}, or flowmill ema for a later one"
        )
    if folder is None:
        raise InputError(f"{run / CHECKPOINTS}: no checkpoint yet. Remedy: flowmill train.")
    raise InputError(
        f"weights {which!r}: got a name that {folder} lacks, expected one of {names}, or one that "
        "`flowmill ema` made"
    )
