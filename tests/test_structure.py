"""The layout's promises: who imports whom, names in strings, sizes of functions, what reaches a cluster."""

import ast
import graphlib
import importlib
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Callable
from pathlib import Path

import jaxtyping
import pytest
import torch
import typer

from pipeline.cli import STAGES

ROOT = Path(__file__).parent.parent
PACKAGES = ("models", "data_prep", "pipeline", "cluster")
MAY_IMPORT = {
    "models": {"models"},
    "data_prep": {"data_prep", "models"},
    "pipeline": {"pipeline", "models"},  # and CONTRACT
    "cluster": set(PACKAGES),
}
# What a prepared dataset is, and how it is read: the pipeline's too.
CONTRACT = "data_prep.schema."
# The floors of a package, the highest first: a file or folder imports from its own floor and from lower ones.
# What is named need not exist yet; what is not named, the commands above all, stands over all floors.
FLOORS = {
    "models": "command files config",
    "data_prep": "sources images storage text schema",
    "pipeline": "evaluation inference runs training objectives data distributed config",
}
# Defects that are being mended: only take lines off these lists.
UPWARD = {
    # A path and a distribution of t are their configs.
    "pipeline.objectives.config -> pipeline.objectives.paths",
    "pipeline.objectives.config -> pipeline.objectives.timesteps",
}
MANY_PARAMETERS = {
    # Their parameters are those of diffusers' pipelines.
    "pipeline.inference.diffusers_pipeline.__call__",
    "pipeline.inference.diffusers_pipeline.__init__",
}
MODULES = {
    str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
PYTEST = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]


def imports(path: Path) -> set[str]:
    """Full names of what a module imports, wherever in it; a relative import would have no name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_of(name: str) -> str | None:
    """The module of ours that an import of `name` reads, the package itself where it has no such module."""
    return next((n for n in (name, name.rpartition(".")[0]) if n in MODULES), None)


ARROWS = {
    (name, found)
    for name, path in MODULES.items()
    for i in imports(path)
    if (found := module_of(i)) and found != name
}
# Arrows within a package.
INNER = {(a, b) for a, b in ARROWS if a.split(".")[0] == b.split(".")[0]}


def floor(module: str) -> int:
    """0 is the lowest; a package's own __init__ stands below all."""
    package, _, rest = module.partition(".")
    floors = FLOORS.get(package, "").split()[::-1]
    # What a room's config holds, every room may know.
    room = "config" if rest in ("arguments", "config") or rest.endswith(".config") else rest
    room = room.split(".")[0]
    return -1 if not room else floors.index(room) if room in floors else len(floors)


def test_a_module_imports_only_along_the_arrows():
    for name, path in MODULES.items():
        package = name.split(".")[0]
        for imported in imports(path):
            head = imported.split(".")[0]
            if head not in (*PACKAGES, "tests", "configs"):
                continue
            if package == "pipeline" and f"{imported}.".startswith(CONTRACT):
                continue
            assert head in MAY_IMPORT[package], f"{name} imports {imported}"


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: [b for a, b in ARROWS if a == name] for name in MODULES}
    graphlib.TopologicalSorter(graph).prepare()


def test_no_room_imports_from_a_higher_floor():
    assert {f"{a} -> {b}" for a, b in INNER if floor(b) > floor(a)} - UPWARD == set()


def test_no_module_of_a_package_imports_one_of_its_commands():
    commands = {module for module, _ in STAGES.values()} | {"pipeline.cli"}
    assert {f"{a} -> {b}" for a, b in INNER if b in commands} == set()


def test_no_function_is_longer_than_60_lines_or_takes_more_than_six_parameters():
    """A command's main takes its options, which typer reads from its parameters."""
    long, many = set(), set()
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                name, given = f"{module}.{node.name}", node.args
                taken = {a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)}
                if (node.end_lineno or 0) - node.lineno >= 60:
                    long.add(name)
                if len(taken - {"self", "cls"}) > 6 and node.name != "main":
                    many.add(name)
    assert long == set()
    assert many - MANY_PARAMETERS == set()


# --- names in strings --------------------------------------------------------------------------------------------------

# Examples in tests and code within strings, which name nothing of this repository.
NOT_OURS = {
    "data_prep.__file__",
    "pipeline.set_progress_bar_config",
    "models.py",
    "cluster.yaml",
    "configs/prepare_",
    "tests/nothing",
    "models/no",
    "tests/no",
}
DOTTED = re.compile(rf"(?<![\w./])((?:{'|'.join(PACKAGES)}|tests)(?:[.:][A-Za-z_]\w*)+)")
SLASHED = re.compile(rf"(?<![\w./-])((?:{'|'.join(PACKAGES)}|tests|configs)/[\w./-]*\w)")


def tracked() -> list[Path]:
    """Text files that git knows."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in done.stdout.split("\0")[:-1]]
    return [p for p in paths if p.is_file() and p.suffix not in (".png", ".safetensors")]


def prose(path: Path) -> str:
    """A file's text; of Python its strings and comments, for the rest is the type checker's."""
    text = path.read_text()
    if path.suffix != ".py":
        return text
    strings = [n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant)]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token.string for token in tokens if token.type == tokenize.COMMENT]
    return "\n".join([*(s for s in strings if isinstance(s, str)), *comments])


def resolves(name: str) -> bool:
    """Whether a dotted name is a folder, a module, or something that its module mentions."""
    parts = re.split("[.:]", name)
    for count in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:count])
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if place.is_dir() or file.is_file():
            rest, text = parts[count:], file.read_text() if file.is_file() else ""
            return not rest or bool(re.search(rf"\b{rest[0]}\b", text))
    return False


def test_every_module_and_path_that_a_text_names_is_there():
    lost = set()
    for path in tracked():
        # The lists of what is to be mended go out of date by being mended.
        if path.name in ("test_structure.py", "test_english.py"):
            continue
        text = prose(path)
        names = {name for name in DOTTED.findall(text) if not resolves(name)}
        names |= {name for name in SLASHED.findall(text) if not (ROOT / name).exists()}
        lost |= {f"{path.relative_to(ROOT)}: {name}" for name in names - NOT_OURS}
    assert lost == set()


def test_every_stage_of_the_command_line_is_a_command():
    for module, _ in STAGES.values():
        assert 'if __name__ == "__main__":' in MODULES[module].read_text(), module


def test_what_the_type_checker_reads_strictly_is_there():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]
    assert set(settings["include"]) == set(PACKAGES)
    assert [name for name in settings["strict"] if not list(ROOT.glob(name))] == []


# --- shapes ------------------------------------------------------------------------------------------------------------

(OPTION,) = [o for o in PYTEST["addopts"] if o.startswith("--jaxtyping-packages=")]
COVERED = OPTION.partition("=")[2].split(",")[:-1]  # the last is the type checker
# Modules whose shapes nothing checks yet: only take names off this list.
UNCOVERED = {"pipeline.inference.heldout", "pipeline.evaluation.metrics"}


def test_a_wrong_shape_fails_wherever_shapes_are_checked():
    from data_prep import fitting
    from models import layers
    from models.conditions import Conditions
    from models.vae import LatentCodec
    from pipeline.data import randomness
    from pipeline.inference import grid, painter
    from pipeline.objectives import objective, sampling
    from pipeline.training import forward, monitor

    flat, chosen = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    flow, sampler = objective.Objective(objective.ObjectiveConfig()), sampling.SamplerConfig()
    wrong: dict[str, Callable[[], object]] = {
        "models": lambda: layers.take(flat, chosen),
        "data_prep.fitting": lambda: fitting.heldout_psnr(
            LatentCodec.__new__(LatentCodec), flat.byte()
        ),
        "pipeline.objectives.objective": lambda: objective.alignment_loss(flat, flat),
        "pipeline.data.randomness": lambda: randomness.draw_noise(0, flat, [0], (1,)),
        "pipeline.training.forward": lambda: forward.loss_of_kept(flow, *[flat] * 5),
        "pipeline.objectives.sampling": lambda: sampling.generate(
            print, flow, flat, sampling.Guidance(Conditions()), sampler
        ),
        "pipeline.training.monitor": lambda: monitor.Monitor.pictures(None, flat.byte()),
        "pipeline.inference.grid": lambda: grid.to_pil(flat.byte()),
        "pipeline.inference.painter": lambda: painter.Painter.draw(
            None, 0, flow, sampler, flat, [0]
        ),
    }
    assert wrong.keys() == set(COVERED)
    for package, call in wrong.items():
        with pytest.raises(jaxtyping.TypeCheckError) as error:
            call()
        assert "f32[2,3]" in str(error.value) or "u8[2,3]" in str(error.value), package


def test_every_module_that_states_shapes_is_checked():
    stating = {n for n in MODULES if any(i.startswith("jaxtyping.") for i in imports(MODULES[n]))}
    under = {n for n in stating for c in COVERED if n == c or n.startswith(f"{c}.")}
    assert stating - under - UNCOVERED == set()


HEAVY = {"torch", "transformers", "ray", "deepspeed", "matplotlib"}


def loaded(code: str) -> list[str]:
    """What Python prints after CODE of the heavy modules that it has loaded."""
    code += f"\nimport sys; print(*{HEAVY} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("name", ["data_prep.decoder", "models.weights", "data_prep.schema"])
def test_what_decoding_processes_import_loads_neither_torch_nor_what_commands_need(name):
    slight = "import sys; assert not {'typer', 'rich', 'omegaconf'} & sys.modules.keys()"
    assert loaded(f"import {name}; {slight}") == []


START = f"""
import contextlib, io, sys
from pipeline import cli
for words in [*([name, "--help"] for name in cli.STAGES), ["config", "show", "configs/demo_train.yaml"]]:
    sys.argv = ["flowmill", *words]
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as shown:
        cli.main()
    assert shown.getvalue(), words
    assert not {HEAVY} & sys.modules.keys(), words
"""


def test_help_and_configs_are_shown_without_what_only_work_needs():
    assert loaded(START) == []


def test_no_module_hides_one_of_the_standard_library():
    stems = {path.stem for path in MODULES.values()} - {"__init__"}
    assert stems & sys.stdlib_module_names == set()


COMMANDS = [
    (name, found[1])
    for name, path in MODULES.items()
    if (found := re.search(r"^    run_command\((\w+)", path.read_text(), re.M))
]


@pytest.mark.parametrize(("module", "function"), COMMANDS)
def test_an_option_that_is_off_by_itself_has_no_negation(module, function):
    app = typer.Typer()
    app.command()(getattr(importlib.import_module(module), function))
    for option in typer.main.get_command(app).params:
        assert option.default is True or not option.secondary_opts, option.opts


def test_git_ignores_nothing_that_a_ray_job_must_upload():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    files = [p for folder in (*PACKAGES, "configs", "tests") for p in (ROOT / folder).rglob("*")]
    files = [p for p in files if p.is_file() and "__pycache__" not in p.parts]
    names = "\n".join(str(p.relative_to(ROOT)) for p in files)
    command = ["git", "check-ignore", "--no-index", "--stdin"]
    done = subprocess.run(command, input=names, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == ""
    assert "models/demo_vae/" in names


def test_each_ignore_line_is_anchored_or_names_a_by_product():
    for line in (ROOT / ".gitignore").read_text().split():
        assert line.startswith("/") or line in ("__pycache__/", "*.egg-info/")


def test_the_top_level_holds_the_named_folders_only():
    folders = {path.relative_to(ROOT).parts[0] for path in tracked() if path.parent != ROOT}
    assert {f for f in folders if not f.startswith(".")} <= {*PACKAGES, "configs", "tests"}
