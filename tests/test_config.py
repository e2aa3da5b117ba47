"""Configs: what is wrong is said with its path, what was got and the remedy; the shipped ones build."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from models.command import load_config
from models.config import InputError, differences
from pipeline import cli, plan, show_config, train
from pipeline.config import TrainConfig, dump_config
from pipeline.objectives.config import SamplerConfig
from pipeline.objectives.timesteps import ConstantShift
from pipeline.training.engine import lr_schedule
from tests.shard_factory import Kind, make_dataset
from tests.train_factory import run, write_config

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


# --- what must fit together

SCHEDULES = ("constant_with_warmup", "cosine", "linear", "warmup_stable_decay")
LENGTHS = (0, 4, 8, 16, 96, 184, 192, 200)


def test_a_schedule_is_refused_or_reaches_its_peak_decays_at_the_end_and_never_wastes_a_step(
    tmp_path,
):
    accepted = refused = 0
    for schedule, warmup, decay in itertools.product(SCHEDULES, LENGTHS, LENGTHS):
        given = f"{{schedule: {schedule}, warmup_images: {warmup}, decay_images: {decay}, lr: 1}}"
        text = MINIMAL.replace("100", "192, global_batch: 8") + f"optimizer: {given}"
        try:
            config = load(tmp_path, text)
        except InputError:
            refused += 1
            continue
        accepted += 1
        lr = lr_schedule(config.optimizer, 8, 24)
        rates = [lr(step) for step in range(24)]
        assert max(rates) == 1, given
        assert min(rates) > 0, given
        rising = max(warmup // 8 - 1, 0)
        assert [r < 1 for r in rates[: rising + 1]] == [True] * rising + [False], given
        falls = schedule in ("cosine", "linear") or decay > 8
        assert (rates[-1] < 1) == falls, given
        if schedule == "warmup_stable_decay":
            assert rates.count(1) == 24 - rising - max(decay // 8 - 1, 0), given
    assert (accepted, refused) == (32, 224)


MISFITS = {
    "optimizer.warmup_images=800": "warm-up and decay got 101 steps of 8 pictures",
    "optimizer.warmup_images=7": "optimizer.warmup_images: got 7, less than a batch",
    "optimizer.decay_images=64": "decay_images: got 64 with schedule cosine",
    "optimizer.schedule=warmup_stable_decay": "decay_images: got 0",
    "optimizer.betas=[1.5,0.9]": "optimizer.betas.0",
    "optimizer.betas=[0.9,1]": "optimizer.betas.1",
    "optimizer.eps=-1": "optimizer.eps",
    "engine.micro_batch=3": "engine.micro_batch: got 3, expected a divisor",
    "data.canonical_partitions=3": "data.canonical_partitions: got 3",
    "training.caption_dropout=0 sampler.guidance_scale=4": "sampler.guidance_scale: got 4",
    "sampler.shift={kind: constant, value: 2} objective.preset=sd15-epsilon": "sampler.shift",
    "start_from.run=a model.init_from=b": "start_from and model.init_from: got both",
    "monitor.profile_steps=[5,2]": "profile_steps: got [5, 2]",
    "monitor.profile_steps=[0,2]": "profile_steps: got [0, 2]",
    "rejection.window=5": "window: no effect without spike_factor",
    "checkpoint.keep_every_steps=7": "keep_every_steps: got 7, expected a multiple of every_steps, 6",
    "model.num_classes=-1": "model.num_classes",
    "model.vision_dim=8": "vision_dim: no effect without alignment",
    "model.rope=true model.position_extent=0": "position_extent has no effect with rope",
    "model.hidden_size=70": "model.hidden_size: got 70",
    "model.mup_base_width=33": "model.mup_base_width: got 33",
    "model.routing.start=3": "model.routing: got blocks 3 to",
    "model.alignment.block=9": "model.alignment.block: got 9",
    "model={kind: unet, size: debug, latent_downscale: 8}": "latent_downscale: no effect",
    "model={kind: uvit, size: debug, depth: 4}": "model.depth: got 4",
    "model={kind: mmdit, size: debug, rope: true, position_extent: 8}": "position_extent",
    "model={kind: mmdit, size: debug, rope: true, position_grid: 8}": "position_grid",
    "model={kind: mmdit, size: debug, position_grid: 1}": "model.position_grid patches",
    "model.num_classes=2": "class labels: got False",
    "data.text_length=6": "longest text: got 5, expected at least data.text_length, 6",
}


@pytest.fixture(scope="module")
def trained_config(tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("misfits"))


@pytest.mark.parametrize("misfit", MISFITS)
def test_what_does_not_fit_is_refused_alike_before_anything_is_written(trained_config, misfit):
    overrides = re.split(r" (?=[a-z.]+[._][a-z_]+=)", misfit)
    commands = [
        lambda: train.main(trained_config, overrides, dry_run=True),
        lambda: train.main(trained_config, overrides),
        lambda: plan.main(trained_config, overrides, gpus=1),
    ]
    if "data" not in misfit and "class" not in misfit and "grid: 1" not in misfit:
        commands.append(lambda: show_config.main("show", [str(trained_config), *overrides]))
    said = set()
    for command in commands:
        with pytest.raises(InputError) as error:
            command()
        said.add(str(error.value))
    assert len(said) == 1
    assert MISFITS[misfit] in said.pop()
    assert not (trained_config.parent / "run").exists()


def floats_of(config: BaseModel, path: str = "") -> Iterator[str]:
    """The path of every float below a config."""
    for name, value in config:
        if isinstance(value, float):
            yield f"{path}{name}"
        elif isinstance(value, BaseModel):
            yield from floats_of(value, f"{path}{name}.")


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_no_number_may_be_infinite_or_none(tmp_path, value):
    paths = list(floats_of(load(tmp_path)))
    assert len(paths) > 10
    for path in paths:
        with pytest.raises(InputError, match=path):
            load(tmp_path, MINIMAL, "objective.timesteps.kind=logit_normal", f"{path}={value}")


def test_what_comes_after_the_end_is_a_note(trained_config, capsys):
    later = ["checkpoint.every_steps=25", "monitor.profile_steps=[3,30]", "monitor.every_steps=24"]
    train.main(trained_config, later, dry_run=True)
    shown = capsys.readouterr().out
    assert "M parameters" in shown
    assert not (trained_config.parent / "run").exists()
    notes = [line for line in shown.splitlines() if line.startswith("note")]
    said = ["checkpoint.every_steps", "monitor.sample_every_steps", "monitor.profile_steps"]
    assert [note.split()[1] for note in notes] == said


@pytest.mark.parametrize(("pictures", "batch"), [(1, 8), (25, 32), (7, 8), (90, 1024)])
def test_a_dataset_of_less_than_a_batch_is_described_and_planned(tmp_path, capsys, pictures, batch):
    config = write_config(tmp_path)
    make_dataset(tmp_path / "few", [((32, 32), pictures)], Kind({"mini": (5, 8)}, channels=4))
    options = [f"data.path={tmp_path / 'few'}", f"training.global_batch={batch}"]
    options += ["optimizer.warmup_images=0", f"training.images={2 * batch}"]
    train.main(config, options, dry_run=True)
    assert f"{pictures} pictures per epoch" in (said := capsys.readouterr().out)
    assert f"({2 * batch / pictures:.2f} epochs)" in said


def test_labels_that_a_network_has_no_row_for_are_refused(tmp_path):
    config = write_config(tmp_path)
    kind = Kind({"mini": (5, 8)}, channels=4, label=True)
    make_dataset(tmp_path / "labels", [((32, 32), 40)], kind)
    options = [f"data.path={tmp_path / 'labels'}"]
    for classes in range(1, 12):
        options[1:] = [f"model.num_classes={classes}"]
        if classes < 10:
            with pytest.raises(InputError, match=f"got 10, expected at most .*{classes}"):
                train.main(config, options, dry_run=True)
        else:
            train.main(config, options, dry_run=True)


def test_a_sampler_given_later_must_fit_the_training_too(tmp_path):
    config = load(tmp_path, MINIMAL, "training.caption_dropout=0")
    shifted = load(tmp_path, MINIMAL, "objective.preset=sd15-epsilon")
    config.check_samplers(SamplerConfig(), SamplerConfig(num_steps=3))
    with pytest.raises(InputError, match="guidance_scale: got 3"):
        config.check_samplers(SamplerConfig(), SamplerConfig(guidance_scale=3))
    with pytest.raises(InputError, match=r"sampler\.shift has no meaning"):
        shifted.check_samplers(SamplerConfig(shift=ConstantShift(value=2)))
