"""A curriculum: a stage is a run that starts from the former's weights; positions follow the resolution."""

import itertools
import json
import random

import pytest
import torch
import yaml
from safetensors.torch import save_file

from models.config import InputError, parse_config
from models.layers import positions_2d
from models.networks import build_model
from pipeline.config import StartConfig, TrainConfig, dump_config, load_run_config
from pipeline.inference.exported import make_scheduler
from pipeline.objectives.config import PRESETS, ObjectiveConfig
from pipeline.runs.start import (
    finished,
    in_its_terms,
    load_stages,
    load_start,
    objective_of,
    resize_positions,
)
from pipeline.training.checkpoint import load_weights
from tests import train_factory
from tests.shard_factory import Kind, make_dataset

STAGES = """
stages:
  low: {}
  high: {data: {path: DATA}, training: {images: 32}, objective: {shift: {kind: constant, value: 2}},
         model: {position_extent: 4}, optimizer: {schedule: constant_with_warmup, warmup_images: 0}}
"""


@pytest.fixture
def curriculum(tmp_path):
    config = train_factory.write_config(tmp_path)
    kind = Kind(encoders={"mini": (5, 8)}, channels=4)
    make_dataset(tmp_path / "large", [((64, 64), 30)], kind)
    config.write_text(config.read_text() + STAGES.replace("DATA", str(tmp_path / "large")))
    return config


@pytest.mark.distributed
def test_stages_follow_one_another_and_a_finished_one_is_left_alone(curriculum, tmp_path):
    command = ("pipeline.train", str(curriculum), "training.images=64")
    done = train_factory.run(*command)
    assert done.returncode == 0, done.stderr
    low, high = load_stages(curriculum, ["training.images=64"])
    assert (low.training.images, high.training.images) == (64, 32)
    assert finished(low)
    assert finished(high)
    saved = load_run_config(tmp_path / "run" / "high")
    assert saved.start_from == StartConfig(run=str(tmp_path / "run" / "low"), weights="ema")
    assert saved.model.position_extent == 4
    # Four steps of lr 1e-3 from the former's average, not from new weights.
    before, after = (
        load_weights(tmp_path / "run" / "low", "ema")[0],
        load_weights(tmp_path / "run" / "high", "raw")[0],
    )
    distance = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert 0 < distance <= 4 * 1.1e-3

    done = train_factory.run(*command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished before") == 2
    assert "step 1/" not in done.stdout


def test_a_stage_of_another_network_is_refused_with_what_differs(finished_run):
    config = load_run_config(finished_run)
    start = StartConfig(run=str(finished_run))
    with pytest.raises(InputError, match="has another network"):
        load_start(build_model(config.model.model_copy(update={"qk_norm": True})), start)
    with pytest.raises(InputError, match=r"proj_in.weight: got \(64, 16\), expected \(64, 64\)"):
        load_start(build_model(config.model.model_copy(update={"patch_size": 4})), start)
    with pytest.raises(InputError, match="weights 'emma'"):
        load_start(build_model(config.model), StartConfig(run=str(finished_run), weights="emma"))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    config = train_factory.write_config(folder)
    train_factory.train(config, "training.images=16", "optimizer.warmup_images=0")
    return folder / "run"


def test_learned_positions_of_a_finer_grid_lie_between_the_old_ones():
    table = positions_2d(8, 8, 16, torch.device("cpu"))
    finer = resize_positions(table, 16 * 16)
    # A fine patch's middle is a quarter of a coarse patch before or behind the coarse one's middle.
    exact = positions_2d(16, 16, 16, torch.device("cpu"), extent=8.0).view(16, 16, 16)
    inner = slice(4, 12)
    shifted = resize_positions(exact.flatten(0, 1), 16 * 16)
    assert torch.equal(shifted, exact.flatten(0, 1))  # no resizing, no change
    corner = finer.view(16, 16, 16)[inner, inner]
    slow = corner[..., 2:4]  # the column's slow sines, nearly linear
    places = (torch.arange(16)[inner] + 0.5) / 2 - 0.5
    wanted = torch.stack([(places * 1e-2).sin(), (places * 1e-3).sin()], dim=-1)
    # torch's bicubic (a = -0.75) is off a straight line by 5% of a step, which is 1e-2 here.
    torch.testing.assert_close(slow, wanted.expand(8, 8, 2), rtol=0, atol=6e-4)


def test_names_that_are_not_text_are_refused(tmp_path):
    config = train_factory.write_config(tmp_path)
    config.write_text(config.read_text() + "\nstages: {256: {}}\n")
    with pytest.raises(InputError, match="px256"):
        load_stages(config, [])


def test_a_wrong_key_in_a_stage_is_named_with_its_stage(tmp_path):
    config = train_factory.write_config(tmp_path)
    config.write_text(config.read_text() + "\nstages: {low: {}, high: {training: {imags: 3}}}\n")
    with pytest.raises(InputError, match=r"stages.high: training.imags: unknown key"):
        load_stages(config, [])


# --- weights of another objective

PRESET = yaml.safe_load(PRESETS.read_text())
OBJECTIVES = {name: ObjectiveConfig.model_validate({"preset": name}) for name in PRESET}
# Presets whose networks learn the same.
ALIKE = [{"sd3-rf-logit-normal", "flux-shift"}]


NAMES = list(OBJECTIVES)
# Each with itself and with the next; those that learn the same; and a seeded few.
PAIRS = {*zip(NAMES, NAMES, strict=True), *zip(NAMES, NAMES[1:] + NAMES[:1], strict=True)}
PAIRS |= {(a, b) for a, b in itertools.product(*[sorted(ALIKE[0])] * 2)}
PAIRS |= {tuple(random.Random(n).sample(NAMES, 2)) for n in range(6)}


@pytest.mark.parametrize(("theirs", "ours"), sorted(PAIRS))
def test_weights_of_another_task_are_refused_with_both_names(tmp_path, theirs, ours):
    first, second = OBJECTIVES[theirs], OBJECTIVES[ours]
    text = train_factory.CONFIG.format(data="d", run=tmp_path / "run")
    config = parse_config(TrainConfig, yaml.safe_load(text) | {"objective": {"preset": ours}}, "")
    former = config.model_copy(update={"objective": first})
    (tmp_path / "config.yaml").write_text(dump_config(former))
    about = {"flowmill.config": json.dumps(former.model_dump(mode="json"))}
    save_file({"w": torch.zeros(1)}, tmp_path / "given.safetensors", metadata=about)
    begins = [{"start_from": StartConfig(run=str(tmp_path))}]
    files = [tmp_path / "given.safetensors"]
    network = tmp_path / "pipeline" / "network"
    network.mkdir(parents=True)
    make_scheduler(first, None, (8, 8)).save_pretrained(network.parent / "scheduler")
    if first.path.kind == "vp_discrete" or first.prediction == "flow":
        files.append(network)
    elif first.path.kind != "rectified_flow":  # whose schedulers name no prediction
        assert objective_of(network) is None
    begins += [
        {"model": config.model.model_copy(update={"init_from": str(file)})} for file in files
    ]
    for begin in begins:
        given = config.model_copy(update=begin)
        if first.task == second.task:
            assert in_its_terms(given) == given
            continue
        with pytest.raises(InputError) as error:
            in_its_terms(given)
        assert first.task in str(error.value)
        assert second.task in str(error.value)
    assert (first.task == second.task) == (theirs == ours or {theirs, ours} in ALIKE)


def test_a_stage_of_another_task_is_refused_before_the_first_begins(tmp_path):
    config = train_factory.write_config(tmp_path)
    stages = "\nstages: {a: {}, b: {objective: {preset: edm}}}\n"
    config.write_text(config.read_text() + stages)
    with pytest.raises(InputError, match=r"stages\.b.*learned prediction flow.*prediction edm"):
        load_stages(config, [])
    load_stages(config, ["stages.b.start_from.convert=true"])


def test_a_later_stage_starts_from_the_former_whatever_the_first_starts_from(tmp_path):
    config = train_factory.write_config(tmp_path)
    given = "start_from: {run: /other, weights: raw}\nstages: {a: {}, b: {}, c: {start_from: {step: 3}}}\n"
    config.write_text(config.read_text() + given)
    first, second, third = load_stages(config, [])
    assert first.start_from == StartConfig(run="/other", weights="raw")
    assert second.start_from == StartConfig(run=first.run)
    assert third.start_from == StartConfig(run=second.run, step=3)
