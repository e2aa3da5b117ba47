"""A disk that is full at any stage of any command: one message, nothing lost, and the same line again finishes."""

import shutil
from pathlib import Path

import pytest

from pipeline.training.checkpoint import candidates
from tests.others import SmallDisk
from tests.prep_factory import config_of_pictures, dataset_bytes
from tests.test_rights import TRAIN

pytestmark = pytest.mark.slow
SIZE = 64 << 20


@pytest.fixture(scope="module")
def sources(tmp_path_factory, vae_folder, text_folder) -> Path:
    """Pictures, and a config whose output lies on a disk to be mounted at `disk`."""
    folder = tmp_path_factory.mktemp("full")
    config = config_of_pictures(folder, 40, vae_folder, text_folder, heldout_fraction=0.2)
    text = config.read_text().replace(str(folder / "dataset"), str(folder / "disk" / "dataset"))
    config.write_text(text)
    train = TRAIN.format(folder=folder / "disk", run=folder / "disk" / "run", images=64)
    (folder / "train.yaml").write_text(train)
    return folder


@pytest.fixture(scope="module")
def whole(sources) -> dict[str, bytes]:
    """The dataset that a disk with room gets."""
    with SmallDisk(sources / "disk", SIZE) as disk:
        done = disk.run("data_prep.prepare", str(sources / "c.yaml"))
        assert done.returncode == 0, done.stderr
        shutil.copytree(disk.seen / "dataset", sources / "kept")
        return dataset_bytes(disk.seen / "dataset")


def refuse(done, tried: str) -> None:
    assert done.returncode in (1, 2), f"{tried}: {done.stdout}{done.stderr}"
    said = done.stdout + done.stderr
    assert "Traceback" not in said, f"{tried}: {said}"
    assert "No space left" in said, f"{tried}: {said}"


# Bytes that the disk has left, from the listing to the manifest, which take some 500 KB.
@pytest.mark.parametrize(
    "room", [0, 8192, 20_480, 40_960, 81_920, 163_840, 245_760, 327_680, 409_600]
)
def test_a_preparation_on_a_full_disk_ends_in_one_message_and_goes_on_to_the_same_bytes(
    sources, whole, room
):
    with SmallDisk(sources / "disk", SIZE) as disk:
        disk.leave(room)
        done = disk.run("data_prep.prepare", str(sources / "c.yaml"))
        if done.returncode:
            refuse(done, f"prepare with {room} bytes")
        disk.make_room()
        done = disk.run("data_prep.prepare", str(sources / "c.yaml"))
        assert done.returncode == 0, done.stdout + done.stderr
        assert dataset_bytes(disk.seen / "dataset") == whole


@pytest.mark.parametrize("room", [0, 4096, 16_384, 65_536, 1 << 20, 3 << 20, 6 << 20])
def test_training_on_a_full_disk_loses_nothing_and_goes_on(sources, whole, room):
    with SmallDisk(sources / "disk", SIZE) as disk:
        shutil.copytree(sources / "kept", disk.seen / "dataset")
        disk.leave(room)
        done = disk.run("pipeline.train", str(sources / "train.yaml"))
        assert "Traceback" not in done.stdout + done.stderr, done.stderr
        assert done.returncode in (0, 1, 2)
        disk.make_room()
        done = disk.run("pipeline.train", str(sources / "train.yaml"))
        assert done.returncode == 0, done.stdout + done.stderr
        run = disk.seen / "run"
        assert candidates(run)[0].name == "step_00000008"
        assert not [p for p in run.rglob("*") if p.name.endswith((".tmp", ".partial"))]


@pytest.mark.parametrize("room", [0, 65_536, 1 << 20, 3 << 20])
def test_an_export_and_pictures_on_a_full_disk_are_whole_or_absent(sources, whole, room):
    output, drawn = sources / "disk" / "exported", sources / "disk" / "drawn"
    with SmallDisk(sources / "disk", SIZE) as disk:
        shutil.copytree(sources / "kept", disk.seen / "dataset")
        done = disk.run("pipeline.train", str(sources / "train.yaml"))
        assert done.returncode == 0, done.stderr
        run = str(sources / "disk" / "run")
        export = ["pipeline.export", run, str(output)]
        sample = ["pipeline.sample", run, "--prompt", "x", "--output", str(drawn)]
        disk.leave(room)
        done = disk.run(*export)
        if done.returncode:
            refuse(done, "export")
            assert not [path for path in disk.seen.iterdir() if "exported" in path.name]
        if room == 0:
            refuse(disk.run(*sample), "sample")
        disk.make_room()
        if not (disk.seen / "exported").exists():
            done = disk.run(*export)
            assert done.returncode == 0, done.stderr
        assert (disk.seen / "exported" / "model_index.json").is_file()
        done = disk.run(*sample)
        assert done.returncode == 0, done.stderr
