"""The layout's promises: who imports whom, and that every package reaches a cluster."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("models", "data_prep", "pipeline", "cluster")
MAY_IMPORT = {
    "models": {"models"},
    "data_prep": {"data_prep", "models"},
    "pipeline": {"pipeline", "models"},  # and data_prep.schema
    "cluster": set(PACKAGES),
}
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> list[str]:
    """Full names of what a module imports, wherever in it; a relative import would have no name."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_module_imports_only_along_the_arrows(path):
    package = path.relative_to(ROOT).parts[0]
    for name in imports(path):
        head = name.split(".")[0]
        if head not in (*PACKAGES, "tests", "configs"):
            continue
        if package == "pipeline" and name.startswith("data_prep.schema"):
            continue
        assert head in MAY_IMPORT[package], f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("name", ["models.config", "models.weights", "data_prep.schema"])
def test_what_decoding_processes_import_does_not_import_torch(name):
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_hides_one_of_the_standard_library(path):
    assert path.stem == "__init__" or path.stem not in sys.stdlib_module_names


def test_git_ignores_nothing_that_a_ray_job_must_upload():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    files = [p for folder in (*PACKAGES, "configs", "tests") for p in (ROOT / folder).rglob("*")]
    names = [
        str(p.relative_to(ROOT)) for p in files if p.is_file() and "__pycache__" not in p.parts
    ]
    done = subprocess.run(
        ["git", "check-ignore", "--no-index", "--stdin"],
        input="\n".join(names),
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.stdout == ""
    assert any(name.startswith("models/demo_vae/") for name in names)


def test_each_ignore_line_is_anchored_or_names_a_by_product():
    for line in (ROOT / ".gitignore").read_text().split():
        assert line.startswith("/") or line in ("__pycache__/", "*.egg-info/")


def test_the_top_level_holds_the_named_folders_only():
    done = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        pytest.skip("not a git checkout")
    folders = {name.split("/")[0] for name in done.stdout.split() if "/" in name}
    assert {f for f in folders if not f.startswith(".")} <= {*PACKAGES, "configs", "tests"}
