"""What a newcomer types: `flowmill` alone, a stage's help, names that are nearly right."""

import os
import re
from pathlib import Path

import pytest

from models.command import read_yaml
from models.config import InputError, parse_config
from pipeline.cli import STAGES
from pipeline.config import TrainConfig
from tests.test_docs import slugs
from tests.train_factory import ROOT, run


def test_flowmill_alone_names_every_stage_and_the_page_to_begin_with():
    done = run("pipeline.cli")
    assert done.returncode == 0
    assert re.findall(r"^  ([\w-]+) ", done.stdout, flags=re.M) == list(STAGES)
    assert "README.md" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("stage", STAGES)
def test_the_help_of_a_stage_ends_with_the_page_that_explains_it(stage):
    done = run("pipeline.cli", stage, "--help", COLUMNS="120")
    assert done.returncode == 0, done.stderr
    last = done.stdout.rstrip().splitlines()[-1].strip()
    told = re.fullmatch(r"Explained in ([\w/.]+)(?:#([\w-]+))?", last)
    assert told, done.stdout
    page = ROOT / told[1]
    assert re.search(rf"(flowmill|make) {stage}\b", page.read_text())
    assert told[2] is None or told[2] in slugs(page)


def test_the_version_is_told():
    done = run("pipeline.cli", "--version")
    assert (done.returncode, done.stdout) == (0, "flowmill 0.1.0\n")


def test_a_config_named_without_its_folder_is_found_nearby(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    with pytest.raises(InputError, match=re.escape("Did you mean configs/prepare_folder.yaml")):
        read_yaml(Path("prepare_folder"), [])
    monkeypatch.chdir(tmp_path)
    there = os.path.relpath(ROOT / "configs" / "prepare_folder.yaml")
    with pytest.raises(InputError, match=re.escape(f"Did you mean {there}")):
        read_yaml(Path("prepare_folder.yaml"), [])


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ("images=64", "x.yaml: images: unknown key; did you mean 'training.images'?"),
        ("micro_batch=8", "micro_batch: unknown key; did you mean 'engine.micro_batch'?"),
        ("model.lr=1", "model.lr: unknown key; did you mean 'optimizer.lr'?"),
        ("data.seed=1", "data.seed: unknown key; did you mean 'seed' or "),
        ("model.sise=S", "model.sise: unknown key; did you mean 'size'?"),
    ],
)
def test_a_key_of_another_section_is_told_where_it_belongs(change, hint):
    path = ROOT / "configs" / "train_dit_b.yaml"
    with pytest.raises(InputError) as error:
        parse_config(TrainConfig, read_yaml(path, [change]), "x.yaml")
    assert hint in str(error.value)
