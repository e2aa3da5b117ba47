"""Options that several commands share, and how their values are read: sizes, prompts, sampler settings."""

import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar, get_type_hints

import typer

from models.config import InputError, parse_config

if TYPE_CHECKING:
    from pipeline.objectives.config import SamplerConfig

Options = TypeVar("Options")

RunFolder = Annotated[Path, typer.Argument(help="folder of a training run")]
ConfigFile = Annotated[Path, typer.Argument(help="YAML file of the run")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value")]
PLACES = r"data\.(datasets\.[^.]+\.)?(path|layers\.[^.]+)|data\.(exclude|scores)|encoders\.(vae|text\.[^.]+)"
"""Keys of a run's config that say where something lies, which may have moved since."""

MOVED = "data.path, data.layers.NAME, encoders.vae or encoders.text.NAME=FOLDER of what has moved"
PlaceOverrides = Annotated[list[str] | None, typer.Argument(help=MOVED)]
SamplerOverrides = Annotated[list[str] | None, typer.Argument(help=f"sampler.key=value; {MOVED}")]
Weights = Annotated[str, typer.Option(help="raw, ema, or another average")]
Step = Annotated[int | None, typer.Option(help="of the checkpoint; the newest")]
LED_FROM = "weights that guidance leads away from: NAME, NAME@STEP or RUN:NAME@STEP"
Guide = Annotated[str | None, typer.Option(help=LED_FROM)]
BatchSize = Annotated[int, typer.Option(min=1, help="pictures at a time on each rank")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="check and describe; write nothing")]
Override = Annotated[
    bool, typer.Option("--override", help="resume with changed values that change results")
]


def takes(options: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """A command's arguments are the fields of a frozen dataclass, which the command gets as one."""

    def decorate(function: Callable[[Options], None]) -> Callable[..., None]:
        def command(**given: object) -> None:
            function(options(**given))

        command.__doc__ = function.__doc__
        command.__annotations__ = get_type_hints(options, include_extras=True)
        command.__signature__ = inspect.signature(options)  # pyright: ignore[reportFunctionMemberAccess]
        return command

    return decorate


def parse_size(text: str, option: str = "--size") -> tuple[int, int]:
    """Height and width of "HEIGHTxWIDTH"; raises InputError."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise InputError(f"{option}: got {text!r}, expected HEIGHTxWIDTH such as 256x256")
    return int(match[1]), int(match[2])


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """Prompts from the arguments and from the lines of a UTF-8 file; raises InputError where there are none."""
    lines: list[str] = []
    if file is not None:
        if not file.is_file():
            raise InputError(f"{file}: no such file, expected one prompt per line")
        lines = [line.strip() for line in re.split("[\r\n]", _read_text(file))]
    prompts = [*given, *filter(None, lines)]
    if not prompts:
        raise InputError('no prompt: got none, expected --prompt "..." or --prompts-file FILE')
    return prompts


def _read_text(file: Path) -> str:
    """A UTF-8 file, with a byte order mark or without; raises InputError that names the first other byte."""
    data = file.read_bytes()
    bad, text = data.find(0), ""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        bad = error.start
    if bad >= 0:
        raise InputError(
            f"{file}: byte {bad} is 0x{data[bad]:02x}, expected UTF-8 text. Remedy: save it as UTF-8"
        )
    return text.removeprefix("\ufeff")


def split_places(overrides: list[str] | None) -> tuple[list[str], list[str]]:
    """The overrides that say where something lies, and the others."""
    given = overrides or []
    places = [item for item in given if re.fullmatch(PLACES, item.partition("=")[0])]
    return places, [item for item in given if item not in places]


def parse_sampler(saved: "SamplerConfig", overrides: list[str]) -> "SamplerConfig":
    """The run's sampler with `sampler.key=value` overrides; raises InputError for any other section."""
    data = saved.model_dump()
    for item in overrides:
        key, _, value = item.partition("=")
        if not key.startswith("sampler.") or not value:
            raise InputError(
                f"override {item!r}: expected sampler.key=value, or {MOVED}; the rest is the run's"
            )
        try:
            data[key.removeprefix("sampler.")] = json.loads(value)
        except ValueError:
            data[key.removeprefix("sampler.")] = value
    return parse_config(type(saved), data, "sampler")
