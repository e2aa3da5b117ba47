"""Configs: what is wrong is said with its path, what was got and the remedy; the shipped ones build."""

from pathlib import Path

import pytest

from models.command import load_config
from models.config import InputError, differences
from models.networks import build_model
from pipeline import cli
from pipeline.config import TrainConfig, dump_config
from tests.train_factory import run

ROOT = Path(__file__).parent.parent
MINIMAL = "data: {path: somewhere}\ntraining: {images: 100}\nrun: somewhere\n"


def load(tmp_path: Path, text: str = MINIMAL, *overrides: str) -> TrainConfig:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load_config(TrainConfig, path, list(overrides))


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("optimizer.lrr=1", ["optimizer.lrr", "unknown key", "'lr'"]),
        ("engin.zero_stage=1", ["engin", "unknown key", "'engine'"]),
        (
            "objective.timesteps={kind: logit_normal, men: 1}",
            ["objective.timesteps.men", "unknown key", "'mean'"],
        ),
        ("data.datasets={a: {path: x, repat: 2}}", ["data.datasets.a.repat", "'repeat'"]),
        ("engine.zero_stage=4", ["engine.zero_stage", "4"]),
        ("training.images=-1", ["training.images", "greater than 0", "-1"]),
        ("training=3", ["training", "3"]),
        ("lr", ["'lr'", "section.key=value"]),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_would_be_right(tmp_path, override, parts):
    with pytest.raises(InputError) as error:
        load(tmp_path, MINIMAL, override)
    for part in parts:
        assert part in str(error.value)


def test_a_missing_key_and_a_missing_file_are_named(tmp_path):
    with pytest.raises(InputError, match=r"training\.images: missing"):
        load(tmp_path, "data: {path: x}\ntraining: {}\nrun: x\n")
    (tmp_path / "train_small.yaml").write_text(MINIMAL)
    with pytest.raises(InputError, match=r"no such config file.*train_small\.yaml"):
        load_config(TrainConfig, tmp_path / "train_smal.yaml", [])


def test_numbers_of_every_spelling_and_interpolations_are_read(tmp_path):
    config = load(tmp_path, MINIMAL + "optimizer: {lr: 1e-4}\n", "ema.halflife_images=2e5")
    assert (config.optimizer.lr, config.ema.halflife_images) == (1e-4, 2e5)
    config = load(tmp_path, MINIMAL, "data.path=${package:pipeline}/x")
    assert config.data.path == str(ROOT / "pipeline" / "x")
    with pytest.raises(InputError, match=r"no_such_package.*not installed"):
        load(tmp_path, MINIMAL, "data.path=${package:no_such_package}")


def test_a_dumped_config_reads_back_the_same(tmp_path):
    config = load(
        tmp_path, MINIMAL, "objective.preset=sd3-rf-logit-normal", "monitor.prompts=[a, b]"
    )
    again = load(tmp_path, dump_config(config))
    assert again == config
    changed = load(tmp_path, MINIMAL, "optimizer.lr=3e-4", "objective.preset=sd3-rf-logit-normal")
    assert set(differences(config, changed)) == {"optimizer.lr", "monitor.prompts"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*train*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_training_config_builds_its_model(path):
    config = load_config(TrainConfig, path, [])
    sizes = {"latent_channels": 4, "text_dim": 8, "pooled_dim": 8}
    missing = {k: v for k, v in sizes.items() if getattr(config.model, k) is None}
    import torch

    with torch.device("meta"):
        build_model(config.model.model_copy(update=missing))


def test_a_command_ends_wrong_input_with_status_2_and_no_traceback(tmp_path):
    (tmp_path / "run.yaml").write_text(MINIMAL)
    for arguments in (
        ["train", "run.yaml", "optimizer.lrr=1"],
        ["train", "absent.yaml"],
        ["trian"],
    ):
        done = run("pipeline.cli", *arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith("error ")


def test_plan_asks_the_package_that_the_config_is_for(tmp_path):
    train, prepare = ROOT / "configs/demo_train.yaml", ROOT / "configs/demo_prepare.yaml"
    assert cli.module_of("plan", [str(train), "--gpus", "8"]) == "pipeline.plan"
    assert cli.module_of("plan", ["--sample", "8", str(prepare)]) == "data_prep.estimate"
    assert cli.module_of("plan", [str(tmp_path / "absent.yaml")]) == "pipeline.plan"
    assert cli.module_of("prepare", [str(prepare)]) == "data_prep.prepare"
