"""What is not ours, lying beside what is ours under almost the same name: nothing reads it, nothing deletes it."""

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from data_prep.config import PrepareConfig
from data_prep.preparation import prepare
from models.command import load_config
from models.config import InputError
from models.files import temporary_for, write_text
from pipeline.evaluation.reference import find_pictures
from pipeline.inference.sheet import make_folder
from pipeline.training.checkpoint import candidates, load_weights, save_weights, step_folders
from pipeline.training.power_ema import read_snapshots
from tests import train_factory
from tests.prep_factory import config_of_pictures, dataset_bytes
from tests.test_remote import Letters, server  # noqa: F401 - a fixture

ALMOST = ("{}.bak", "{}.bak2", "{}.tar", "{}.tmp", "{}.old.partial", "{}_v2", "{}2", "{} (copy)",
          "{}.1", "{}~", "._{}", ".{}.swp", ".{}.tmp", "x{}", "old_{}", "{}.json", "0{}")  # fmt: skip
LEFT_BY_SYSTEMS = (".DS_Store", "Thumbs.db", "desktop.ini", ".nfs0001")

Strangers = dict[Path, bytes]


def almost(name: str) -> list[str]:
    """Names beside `name`, some with the ending kept."""
    stem, dot, suffix = name.rpartition(".")
    names = [pattern.format(name) for pattern in ALMOST]
    return names + [f"{p.format(stem)}.{suffix}" for p in ALMOST if dot and stem]


def strew(*ours: Path) -> Strangers:
    """Copies of each of ours under almost its name, and the other kind under one; what systems leave."""
    folders = {path.parent for path in ours}
    before = {path for folder in folders for path in folder.iterdir()}
    for path in ours:
        copy = shutil.copytree if path.is_dir() else shutil.copy
        for name in {*almost(path.name), f"@eaDir/{path.name}"} - {p.name for p in before}:
            (path.parent / name).parent.mkdir(exist_ok=True)
            copy(path, path.parent / name)
            other = path.with_name(f"other {Path(name).name}")
            if path.is_file():
                other.mkdir(exist_ok=True)
                other /= "a.json"
            other.write_bytes(b"theirs")
        for name in LEFT_BY_SYSTEMS:
            path.with_name(name).write_bytes(b"theirs")
    new = {path for folder in folders for path in folder.iterdir()} - before
    files = (file for path in new for file in (path, *path.rglob("*")) if file.is_file())
    return {file: file.read_bytes() for file in files}


def check_untouched(strangers: Strangers) -> None:
    assert strangers
    assert [p for p, data in strangers.items() if not p.is_file() or p.read_bytes() != data] == []


@pytest.mark.distributed
def test_a_run_goes_on_saves_and_prunes_among_strangers(tmp_path):
    options = ["training.images=96", "ema.sigma_rels=[0.05]", "ema.snapshot_images=48"]
    config = train_factory.write_config(tmp_path)
    train_factory.train(config, *options, "data.grow=true")
    run = tmp_path / "run"
    ours = [
        *step_folders(run / "checkpoints").values(),
        *step_folders(run / "ema_snapshots").values(),
    ]
    (run / "checkpoints" / "step_00000018.partial").mkdir()
    strangers = strew(
        *ours, run / "checkpoints" / "step_00000018.partial", run / "eras" / "epoch_00000000.json"
    )
    (run / "checkpoints" / "step_00000013.partial").write_text("a file where a folder is expected")
    (run / "checkpoints" / "step_00000011").write_text("the same")
    options[0] = "training.images=192"
    output = train_factory.train(config, *options, "data.grow=true", "--override")
    assert "resuming at step 12 of 24" in output
    assert "NOT saved" not in output
    assert [*step_folders(run / "checkpoints")] == [18, 24]
    assert not (run / "checkpoints" / "step_00000018.partial").exists()
    check_untouched(strangers)
    assert [p.name for p in candidates(run)] == ["step_00000024", "step_00000018"]
    assert [s.step for s in read_snapshots(run, None)] == [6, 12, 18, 24]
    save_weights(run / "ema" / "step_00000024.ema_sigma_0.15.safetensors", {"a": torch.ones(1)}, {})
    strangers = strew(run / "ema" / "step_00000024.ema_sigma_0.15.safetensors")
    assert (
        load_weights(run, "ema_sigma_0.15")[1] == load_weights(run, "ema_sigma_0.15", 24)[1] == 24
    )
    check_untouched(strangers)


def test_a_checkpoint_that_is_a_link_or_cannot_be_deleted_stays_and_ends_nothing(tmp_path):
    from pipeline.training.checkpoint import prune
    from pipeline.training.config import CheckpointConfig

    elsewhere, parent = tmp_path / "elsewhere", tmp_path / "checkpoints"
    for step in (1, 2, 3):
        write_text(parent / f"step_{step:08d}" / "checkpoint.json", "{}")
    (parent / "step_00000001").rename(elsewhere)
    (parent / "step_00000001").symlink_to(elsewhere)
    prune(parent, CheckpointConfig(keep=1))
    assert [*step_folders(parent)] == [1, 3]
    assert (elsewhere / "checkpoint.json").is_file()


def test_pictures_are_drawn_among_strangers_and_only_ours_are_replaced(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    for name in LEFT_BY_SYSTEMS:
        (folder / name).write_bytes(b"theirs")
    make_folder(folder, overwrite=False)
    for name in ("00000_red-square.png", "00012_picture.png", "grid.png"):
        Image.new("RGB", (2, 2)).save(folder / name)
        with pytest.raises(InputError, match="holds pictures already"):
            make_folder(folder, overwrite=False)
    strangers = strew(folder / "00000_red-square.png", folder / "grid.png")
    # This is a name of ours.
    del strangers[folder / "00000_red-square2.png"]
    (folder / "00099_folder.png").mkdir()
    make_folder(folder, overwrite=True)
    check_untouched(strangers)
    assert not (folder / "00000_red-square.png").exists()


def test_the_pictures_of_a_folder_are_those_that_people_see(tmp_path):
    ours = tmp_path / "000000.png"
    Image.new("RGB", (2, 2)).save(ours)
    strew(ours)
    seen = [path.relative_to(tmp_path).as_posix() for path in find_pictures(tmp_path)]
    assert "000000.png" in seen
    assert not [name for name in seen if name.startswith((".", "@"))]


def test_the_cache_evicts_nothing_but_what_it_fetched(tmp_path, server):  # noqa: F811
    cache = Letters(tmp_path, server, 2500)
    cache.file("a").close()
    strangers = strew(cache.folder, cache.top / "lock")
    (cache.top / "backup.tar").write_bytes(b"theirs" * 1000)
    for letter in "bcd":
        cache.file(letter).close()
    assert len(cache.held()) == 2
    check_untouched(strangers | {cache.top / "backup.tar": b"theirs" * 1000})


@pytest.mark.slow
def test_a_preparation_goes_on_among_strangers_to_the_same_bytes(
    tmp_path, ray_address, vae_folder, text_folder
):
    config = config_of_pictures(tmp_path, 12, vae_folder, text_folder)
    settings = load_config(PrepareConfig, config, ["samples_per_shard=5"])
    prepare(settings)
    dataset, work = tmp_path / "dataset", tmp_path / "dataset" / "work"
    before = dataset_bytes(dataset)
    leftover = work / "plan-ab12_xyz.tmp"
    leftover.mkdir()
    strangers = strew(
        *sorted(work.glob("catalog/part-*.parquet")), *sorted(work.glob("plan/*.parquet")),
        *sorted(work.glob("commits/*/*.json")), *sorted(dataset.glob("shards/*/*.tar")),
        leftover, work / "shard_list.parquet", dataset / "manifest.json",
    )  # fmt: skip
    killed = temporary_for(dataset / "rejects.parquet")
    killed.write_bytes(b"half")
    killed.with_name(".mine.tmp").write_bytes(b"theirs")
    killed.with_name(".folder.tmp").mkdir()
    for name in ("manifest.json", "work/shard_list.parquet"):
        (dataset / name).unlink()
    prepare(settings)
    assert not killed.exists()
    assert not leftover.exists()
    assert killed.with_name(".mine.tmp").read_bytes() == b"theirs"
    check_untouched(strangers)
    after = dataset_bytes(dataset)
    assert {name: after[name] for name in before} == before
