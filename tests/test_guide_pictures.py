"""The pictures of the guide to objectives: small, and what the commands beside them draw today."""

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

from models.command import load_config
from pipeline.config import TrainConfig
from pipeline.inference.grid import grid
from pipeline.objectives.config import SamplerConfig
from pipeline.sample import Options, cells_of
from pipeline.show_objective import main
from tests.benchmarks import brightness
from tests.test_docs import ours
from tests.train_factory import ROOT

PICTURES = ROOT / ".github"
GUIDE = ROOT / "pipeline" / "objectives" / "README.md"
MAX_BYTES = 2_000_000
DEMO_SIDE = 64
"""Pixels of the demo's pictures."""


def shown() -> dict[str, list[str]]:
    """The pictures of the guide, each with the words of the first command behind it."""
    parts = re.split(r"!\[[^\]]*\]\(\.\./\.\./\.github/([\w-]+\.png)\)", GUIDE.read_text())
    found = {}
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        command = re.search(r"(?:`|```\n)((?:flowmill|python -m) [^`]+?)\n?`", text)
        assert command, f"{name}: no command behind it"
        found[name] = shlex.split(command[1])
    return found


SHOWN = shown()
REPORTS = [name for name, words in SHOWN.items() if words[:2] == ["flowmill", "objective"]]
SAMPLERS = {"samplers.png": 10, "samplers-20.png": 20, "samplers-50.png": 50}
"""Steps of each sheet."""


def size_of(name: str) -> tuple[int, int]:
    with Image.open(PICTURES / name) as picture:
        return picture.size


def config_of_demo() -> TrainConfig:
    return load_config(TrainConfig, ROOT / "configs" / "demo_train.yaml", [])


def sheet_size(labels: list[str], columns: int) -> tuple[int, int]:
    """Width and height of a sheet of the demo's pictures."""
    blank = torch.zeros(len(labels), 3, DEMO_SIDE, DEMO_SIDE, dtype=torch.uint8)
    return grid(blank, labels, columns).size


def test_every_kind_of_picture_is_checked_here():
    assert len(REPORTS) == 2
    assert {*SHOWN} == {*REPORTS, "brightness.png", *SAMPLERS}


def test_all_pictures_of_the_pages_are_small():
    assert sum(path.stat().st_size for path in PICTURES.glob("*.png")) <= MAX_BYTES


@pytest.mark.parametrize("name", REPORTS)
def test_a_report_shows_the_objective_presets_and_axes_that_its_command_draws_today(name, tmp_path):
    config, *rest = SHOWN[name][2:]
    options = dict(pairwise(rest))
    assert options["--output"] == f".github/{name}"
    overrides = [word for word in rest if re.match(r"[a-z_.]+=", word)]
    main(ROOT / config, overrides, tmp_path / name, options.get("--latent-size", "32x32"))
    with Image.open(tmp_path / name) as new, Image.open(PICTURES / name) as kept:
        assert kept.size == new.size
        remedy = f"{name} is out of date. Remedy: {shlex.join(SHOWN[name])}"
        assert kept.info.get("Description") == new.info["Description"], remedy


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_samplers_are_those_of_the_command_side_by_side(name):
    folder, *rest = SHOWN[name][2:]
    prompts = [value for word, value in pairwise(rest) if word == "--prompt"]
    columns = rest[rest.index("--columns") + 1]
    overrides = [word for word in rest if word.startswith("sampler.")]
    config = config_of_demo()
    assert {*prompts} <= {*config.monitor.prompts}
    options = Options(Path(folder), overrides, prompt=prompts, columns=columns)
    cells = cells_of(options, config.sampler, [])
    # All that there are, each of which the table before the picture explains.
    names = SamplerConfig.model_json_schema()["properties"]["name"]["enum"]
    assert {cell.sampler.name for cell in cells} == {*names}
    assert {cell.sampler.num_steps for cell in cells} == {SAMPLERS[name]}
    labels = [f"{cell.prompt} {cell.label}" for cell in cells]
    assert size_of(name) == sheet_size(labels, len(names))


def test_the_first_page_s_picture_has_the_demo_s_prompts():
    prompts = config_of_demo().monitor.prompts
    assert size_of("demo.png") == sheet_size(prompts, 5)


def test_brightness_has_a_row_for_each_run_and_background():
    module, folder = ours(SHOWN["brightness.png"]) or ("", "")
    assert (module, folder) == (brightness.__name__, "FOLDER")
    rows = len(brightness.RUNS) * len(brightness.BACKGROUNDS)
    assert size_of("brightness.png") == (brightness.SHOWN * brightness.SIZE, rows * brightness.SIZE)
