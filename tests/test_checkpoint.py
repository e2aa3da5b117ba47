"""Checkpoints: cut at every touch of the disk, on a full disk, kept by count and by step."""

import itertools
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipeline.training import checkpoint
from pipeline.training.checkpoint import Saver, candidates, newest_sound, step_folder
from pipeline.training.config import CheckpointConfig

CONFIG = CheckpointConfig(every_steps=1, keep=2)
TOUCHES = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


def tensors() -> dict[str, torch.Tensor]:
    """What one rank writes: 80 KB."""
    return {"raw/a": torch.arange(20_000.0)}


def save(run: Path, step: int, config: CheckpointConfig = CONFIG) -> None:
    """As the trainer does, less the engine."""
    unfinished = step_folder(run / "checkpoints", step).with_suffix(".partial")
    files = checkpoint.write(unfinished / "rank_00000.safetensors", tensors())
    record = {"format": checkpoint.FORMAT, "step": step, "files": files}
    folder = checkpoint.commit(unfinished, {"pieces": {}}, record)
    checkpoint.prune(folder.parent, config)


def in_child(function: Callable[[], None]) -> int:
    """Run it in a child; 0, or the signal that ended it, or 1 where it raised."""
    if not (child := os.fork()):
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status) or os.WEXITSTATUS(status)


def dying_at(touch: int, function: Callable[[], None]) -> Callable[[], None]:
    """The function, in a process that SIGKILL ends just before its touch-th change of the disk."""

    def run() -> None:
        left = [touch]
        for name in TOUCHES:
            original = getattr(os, name)

            def counted(*arguments, original=original, **options):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **options)

            setattr(os, name, counted)
        function()

    return run


def steps_on_disk(run: Path) -> list[int]:
    return [int(folder.name.removeprefix("step_")) for folder in candidates(run)]


def test_a_save_that_is_killed_at_any_touch_of_the_disk_leaves_a_whole_checkpoint(tmp_path):
    for step in (1, 2):
        save(tmp_path / "before", step)
    found = []
    for touch in itertools.count(1):
        run = tmp_path / f"touch_{touch}"
        shutil.copytree(tmp_path / "before", run)
        ended = in_child(dying_at(touch, lambda run=run: save(run, 3)))
        sound = newest_sound(run)
        assert sound is not None
        found.append(sound.name)
        if ended != signal.SIGKILL:
            break
    assert ended == 0
    assert len(found) > 15  # touches there are
    assert found == sorted(found)  # up to the commit the former one, from then on the new one
    assert set(found) == {"step_00000002", "step_00000003"}


def test_half_of_every_file_in_an_unfinished_folder_is_no_checkpoint(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    folder = step_folder(tmp_path / "checkpoints", 2)
    # Now "latest" names what is not there.
    unfinished = folder.rename(folder.with_suffix(".partial"))
    files = list(unfinished.iterdir())
    assert len(files) == 3
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        assert steps_on_disk(tmp_path) == [1]
        assert newest_sound(tmp_path) == step_folder(tmp_path / "checkpoints", 1)
        path.write_bytes(whole)


@pytest.mark.parametrize("limit", [1 << 10, 70 << 10])
def test_a_full_disk_fails_the_save_with_its_reason_and_nothing_else(tmp_path, limit, capfd):
    save(tmp_path, 1)

    def save_to_the_end(step: int) -> Saver:
        saver = Saver(tmp_path / "checkpoints", CheckpointConfig())
        path = step_folder(saver.parent, step).with_suffix(".partial") / "rank_00000.safetensors"
        saver.record = {"step": step, "format": checkpoint.FORMAT}
        places = {"raw/a": [("rank_00000.safetensors", 0, 20_000)]}
        saver.index = {"optimizer_step": 1, "shapes": {"a": [20_000]}, "pieces": places}
        saver.writing = saver.writer.submit(checkpoint.write, path, tensors())
        saver.finish()
        return saver

    def on_a_full_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        assert save_to_the_end(2).failed
        assert not list((tmp_path / "checkpoints").glob("*.partial"))

    assert in_child(on_a_full_disk) == 0
    assert "checkpoint of step 2 NOT saved: rank 0: " in capfd.readouterr().out
    assert steps_on_disk(tmp_path) == [1]
    assert not save_to_the_end(3).failed
    assert steps_on_disk(tmp_path) == [3, 1]


def test_what_is_no_failure_of_the_disk_is_raised(tmp_path):
    saver = Saver(tmp_path)
    saver.writing = saver.writer.submit(lambda: {"a": {"bytes": 1 / 0}})
    with pytest.raises(ZeroDivisionError):
        saver.finish()


def test_the_newest_are_kept_and_those_of_every_so_many_steps(tmp_path):
    config = CheckpointConfig(every_steps=2, keep=2, keep_every_steps=4)
    for step in range(2, 14, 2):
        save(tmp_path, step, config)
    assert sorted(steps_on_disk(tmp_path)) == [4, 8, 10, 12]
