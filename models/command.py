"""What commands share: reading YAML, saying times, and ending with one message where the input is wrong."""

import difflib
import errno
import importlib.util
import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.text import Text
from yaml import YAMLError

from models.config import ConfigType, InputError, parse_config
from models.files import FULL, store_error


def plain_console(min_width: int = 0, stderr: bool = False) -> Console:
    """A terminal that shows names, captions and messages of others as they are: no markup, no emoji."""
    plain: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
    width = max(min_width, Console(stderr=stderr).width)
    return Console(stderr=stderr, soft_wrap=True, width=width, **plain)


def package_folder(name: str, remedy: str = "pip install it, or give a path") -> str:
    """Folder of an importable package: `${package:NAME}` in a YAML file."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(f"Python package {name!r}: not installed. Remedy: {remedy}.")
    return next(iter(spec.submodule_search_locations))


CONFIGS = Path(__file__).parent.parent / "configs"

RIGHTS = "the right to read it and, where it is written, to write there; or another folder"
ROOM = "make room; the same command goes on from what is done"
PLACE = "another path, or move away what lies there"
REMEDIES = dict.fromkeys((errno.EACCES, errno.EPERM), RIGHTS) | dict.fromkeys(FULL, ROOM)
REMEDIES |= {errno.EROFS: "a folder that can be written to"}
REMEDIES |= dict.fromkeys((errno.ENOTDIR, errno.EISDIR, errno.EEXIST), PLACE)
"""What helps against the errors of a disk that are no fault of ours, by their number."""

OmegaConf.register_resolver("package", package_folder, replace=True)


def read_yaml(path: Path, overrides: list[str]) -> dict[str, Any]:
    """The YAML file as plain data, `section.key=value` overrides applied, interpolations resolved."""
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a YAML file")
    if not path.is_file():
        folders = Path(os.path.relpath(CONFIGS)), path.parent
        there = {p.name: str(p) for folder in folders for p in folder.glob("*.yaml")}
        near = difflib.get_close_matches(path.name, there, n=3)
        hint = f" Did you mean {' or '.join(there[name] for name in near)}?" if near else ""
        raise InputError(f"{path}: no such config file.{hint}")
    bad = [item for item in overrides if "=" not in item or item.startswith("=")]
    if bad:
        raise InputError(f"override {bad[0]!r}: expected section.key=value")
    try:
        tree = OmegaConf.load(path)
        if isinstance(tree, DictConfig):
            tree = OmegaConf.merge(tree, OmegaConf.from_dotlist(overrides))
        data = OmegaConf.to_container(tree, resolve=True)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte {error.start} is not UTF-8. Remedy: save it as UTF-8"
        ) from error
    except (OmegaConfBaseException, OSError) as error:
        raise InputError(f"{path}: {str(error).splitlines()[0]}") from error
    except YAMLError as error:
        raise InputError(f"{path}: is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: got {type(data).__name__}, expected a mapping of sections")
    return data  # pyright: ignore[reportReturnType]


def load_config(config_class: type[ConfigType], path: Path, overrides: list[str]) -> ConfigType:
    """Read one YAML file and its overrides into `config_class`; raises InputError."""
    return parse_config(config_class, read_yaml(path, overrides), str(path))


def duration(seconds: float) -> str:
    """A time for people: hours, of which less than a tenth is minutes, and less than a minute seconds."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 3600:,.1f} h" if seconds >= 360 else f"{seconds / 60:.1f} min"


def run_command(function: Callable[..., None], page: str = "README.md", **settings: Any) -> None:
    """Run a stage's `main` as a command: exit 2 and one message when the user's input is wrong.

    Its help ends with the `page` of the repository, and its heading, that explains it.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(epilog=f"Explained in {page}", **settings)(function)
    # A path may hold bytes that are no text.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        app(prog_name=os.environ.pop("FLOWMILL_PROG", None))
    except Exception as error:
        if (message := _explain(error)) is None:
            raise
        plain_console(stderr=True).print(Text("error ", "bold red"), message, sep="")
        sys.exit(2)


def _explain(error: Exception) -> str | None:
    """What to tell the user; None where it may be a fault of ours, which a traceback finds."""
    if isinstance(error, InputError):
        return str(error)
    if said := store_error(error):
        return said
    if not isinstance(error, OSError):
        return None
    # safetensors says so of every file that it cannot open.
    if unopened := re.fullmatch("No such file or directory: (.+)", str(error)):
        try:
            os.close(os.open(unopened[1], os.O_RDONLY))
        except OSError as reason:
            error = reason
    remedy = REMEDIES.get(error.errno or 0)
    where = f"{error.filename}: " if error.filename else ""
    return remedy and f"{where}{error.strerror}. Remedy: {remedy}"
