"""From a folder of pictures to drawn ones, through every stage's own command."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.config import InputError
from pipeline.pictures import grid
from pipeline.sample import parse_sampler, parse_size, read_prompts
from pipeline.sampling import SamplerConfig
from tests import prep_factory, train_factory

CONFIG = """
data: {{path: {data}}}
model: {{size: debug, size_conditioning: true}}
training: {{images: 64, global_batch: 8}}
optimizer: {{lr: 3e-3}}
engine: {{zero_stage: 1, precision: fp32, cpu_threads: 1}}
run: {run}
checkpoint: {{every_steps: 4}}
monitor: {{every_steps: 4, sample_every_steps: 4, prompts: [one, two]}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory, ray_address, vae_folder, text_folder) -> Path:
    """A run on 24 prepared pictures."""
    folder = tmp_path_factory.mktemp("end_to_end")
    pictures = prep_factory.fill_folder(folder / "pictures", 24)
    config = folder / "prepare.yaml"
    prep_factory.write_config(
        config, {"mine": pictures}, vae_folder, text_folder, output=str(folder / "dataset")
    )
    os.environ["RAY_ADDRESS"] = ray_address
    try:
        done = train_factory.run("data_prep.prepare", str(config))
    finally:
        del os.environ["RAY_ADDRESS"]
    assert done.returncode == 0, done.stderr
    config = folder / "train.yaml"
    config.write_text(CONFIG.format(data=folder / "dataset", run=folder / "run"))
    done = train_factory.run("pipeline.train", str(config))
    assert done.returncode == 0, done.stderr
    return folder / "run"


def sample(run: Path, *arguments: str) -> Path:
    """The folder that `sample` wrote."""
    done = train_factory.run("pipeline.sample", str(run), *arguments, "sampler.num_steps=4")
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.split(" to ")[1].split(": {")[0])


def read(folder: Path, prefix: str) -> np.ndarray:
    (path,) = folder.glob(f"{prefix}_*.png")
    return np.asarray(Image.open(path))


def test_training_draws_its_prompts_as_it_goes(run):
    names = [f"step_{step:08d}.png" for step in (0, 4, 8)]
    assert sorted(p.name for p in (run / "samples").glob("step_*.png")) == names
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("samples/ema")] == [0, 4, 8]


def test_a_picture_says_how_it_was_made_and_is_made_again_from_that(run, tmp_path):
    first = sample(
        run, "--prompt", "red square", "--prompt", "a dog", "--output", str(tmp_path / "a")
    )
    info = json.loads(Image.open(next(first.glob("00001_a-dog.png"))).info["flowmill"])
    assert info["prompt"] == "a dog"
    assert (info["step"], info["weights"], info["num_steps"]) == (8, "ema", 4)
    again = sample(
        run, "--prompt", "red square", "--prompt", "a dog", "--output", str(tmp_path / "b")
    )
    assert np.array_equal(read(first, "00001"), read(again, "00001"))
    assert Image.open(first / "grid.png").size[0] > 2 * 32


def test_prompts_weights_guidance_size_and_seed_reach_the_picture(run, tmp_path):
    base = read(sample(run, "--prompt", "red square", "--output", str(tmp_path / "base")), "00000")
    changes = {
        "prompt": ["--prompt", "a dog"],
        "weights": ["--prompt", "red square", "--weights", "raw"],
        "step": ["--prompt", "red square", "--step", "4"],
        "guidance": ["--prompt", "red square", "sampler.guidance_scale=7"],
        "seed": ["--prompt", "red square", "sampler.seed=1"],
    }
    for name, arguments in changes.items():
        other = read(sample(run, *arguments, "--output", str(tmp_path / name)), "00000")
        assert other.shape == base.shape
        assert not np.array_equal(other, base), name
    wide = sample(
        run, "--prompt", "red square", "--size", "24x48", "--output", str(tmp_path / "wide")
    )
    assert read(wide, "00000").shape == (24, 48, 3)


def test_drawn_pictures_are_not_overwritten_unasked(run, tmp_path):
    arguments = ("--prompt", "x", "--output", str(tmp_path / "out"))
    sample(run, *arguments)
    done = train_factory.run("pipeline.sample", str(run), *arguments)
    assert done.returncode == 2
    assert "holds pictures already" in done.stderr
    sample(run, *arguments, "--overwrite")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tmp: read_prompts([], None), "no prompt"),
        (lambda tmp: read_prompts([], tmp / "absent.txt"), "absent.txt: no such file"),
        (lambda tmp: parse_size("12"), "HEIGHTxWIDTH"),
        (lambda tmp: parse_sampler(SamplerConfig(), ["model.size=B"]), "sampler.key=value"),
        (lambda tmp: parse_sampler(SamplerConfig(), ["sampler.num_step=3"]), "'num_steps'"),
    ],
)
def test_what_is_wrong_with_the_arguments_is_said(call, message, tmp_path):
    with pytest.raises(InputError) as error:
        call(tmp_path)
    assert message in str(error.value)


def test_a_folder_that_is_no_run_ends_with_status_2(tmp_path):
    done = train_factory.run("pipeline.sample", str(tmp_path), "--prompt", "x")
    assert done.returncode == 2
    assert "expected the folder of a training run" in done.stderr


def test_a_grid_holds_every_picture_enlarged_and_labelled():
    pictures = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 32, 32) * 100
    sheet = np.asarray(
        grid(pictures, ["a", "b", "a long label of several words"], columns=2, cell=64)
    )
    assert tuple(sheet[6, 6]) == (0, 0, 0)
    assert tuple(sheet[6, 6 + 64 + 6]) == (100, 100, 100)
    assert (sheet == 200).all(axis=2).sum() == pytest.approx(64 * 64, rel=0.02)  # and bits of text
