"""What every config builds on: its base class, and an error that says what is wrong with the user's input.

A module owns the config of what it configures; one YAML file per run holds them all. `models` is the
lowest layer, so the base lives here, where every other package may import it. Importing it imports pydantic
alone: each process that decodes pictures does.
"""

import difflib
import os
from collections.abc import Iterator
from typing import Annotated, Any, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    model_validator,
)


class InputError(ValueError):
    """The user's input is wrong: one message that names path, got, expected and remedy; exit status 2."""


class Config(BaseModel):
    """Base of every config section: frozen, and a key that nobody reads is an error."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )

    def refusals(self) -> Iterator[str]:
        """The reasons why these values give a wrong result together, or one of them none."""
        yield from ()

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        if reasons := list(self.refusals()):
            raise ValueError("\n".join(reasons))
        return self


Place = Annotated[str, AfterValidator(lambda p: p if "://" in p else os.path.abspath(p))]
"""A path from the root on, so that a config that is kept serves from any folder; or a URL as it is."""

ConfigType = TypeVar("ConfigType", bound=Config)

STAGES = {"train": "training", "prepare": "vae", "fit-vae": "sources"}
"""Stage -> a key that its YAML files have, and those of the stages after it lack."""

# Types of pydantic's errors: a value where a section is expected, and a section of no kind that there is.
NO_SECTION = ("model_type", "model_attributes_type", "dict_type")
NO_TAG = ("union_tag_invalid", "union_tag_not_found", "kind")


def _without_nulls(value: Any) -> Any:
    items = value.items() if isinstance(value, dict) else ()
    return {key: each for key, each in items if each is not None} if items else value


Key = TypeVar("Key")
Value = TypeVar("Value")
Entries = Annotated[dict[Key, Value], BeforeValidator(_without_nulls)]
"""What the user names; `section.NAME=null` on the command line takes one out."""


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Every config class that an annotation mentions, through unions, dicts and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


Models = list[type[BaseModel]]


def _tags(model: type[BaseModel]) -> tuple[str, ...]:
    """The kinds by which a union knows a config."""
    kind = model.model_fields.get("kind")
    return get_args(kind.annotation) if kind else ()


def _locate(root: type[Config], location: tuple[int | str, ...]) -> tuple[str, Models]:
    """A pydantic location as the user's path, without unions' tags, and the configs that it ends in."""
    models: Models = [root]
    path = []
    for part in location[:-1]:
        fields = [model.model_fields[str(part)] for model in models if part in model.model_fields]
        tagged = [model for model in models if part in _tags(model)]
        # A union's tag comes before any field, and may be spelt like one.
        if tagged and (len(models) > 1 or not fields):
            models = tagged
            continue
        if fields:
            models = [model for field in fields for model in _models_in(field.annotation)]
        path.append(str(part))
    return ".".join([*path, str(location[-1])] if location else []), models


def explain(error: ValidationError, config_class: type[Config], where: str) -> str:
    """A pydantic error as one line per problem: path, got, expected, nearest valid name."""
    lines = []
    for item in error.errors():
        path, models = _locate(config_class, item["loc"])
        lines.append(f"{where}: {_say(item, path or 'config', models, config_class)}")
    return "\n".join(dict.fromkeys(lines))


def _elsewhere(root: type[Config], key: str) -> list[str]:
    """The paths at which the root and its sections know a key."""
    sections = [
        f"{section}.{key}"
        for section, field in root.model_fields.items()
        if any(key in model.model_fields for model in _models_in(field.annotation))
    ]
    return [key, *sections] if key in root.model_fields else sections


def _say(item: Any, path: str, models: Models, root: type[Config]) -> str:
    """One problem at `path`, of whose last key `models` are the configs."""
    kind, given, last = item["type"], item["input"], item["loc"][-1] if item["loc"] else ""
    got = "" if isinstance(given, dict) else f" (got {given!r})"
    if kind == "extra_forbidden":
        names = sorted({name for model in models for name in model.model_fields})
        near = _elsewhere(root, str(last))
        near = near or difflib.get_close_matches(str(last), names, n=1, cutoff=0.5)
        hint = (
            f"did you mean {' or '.join(map(repr, near[:3]))}?"
            if near
            else f"valid: {', '.join(names)}"
        )
        return f"{path}: unknown key; {hint}"
    if kind == "missing" and isinstance(last, int):
        return f"{path.rpartition('.')[0]}: expected more values{got}"
    if kind == "missing":
        return f"{path}: missing; add it to the file or pass {path}=VALUE"
    if kind in (*NO_SECTION, *NO_TAG):
        _, inside = _locate(root, (*item["loc"], ""))
        choices = ", ".join(tag for model in inside for tag in _tags(model))
        if kind in NO_TAG and isinstance(given, dict):
            tag = f"got {given['kind']!r}" if "kind" in given else "missing"
            return f"{path}.kind: {tag}, expected one of {choices}"
        names = ", ".join(name for model in inside for name in model.model_fields)
        keys = f"kind ({choices})" if choices else names
        return f"{path}: expected a section{f' with keys such as {keys}' if keys else ''}{got}"
    words = item["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    words = "expected a path" if kind == "path_type" else words
    return f"{path}: {words}{got}"


def parse_config(config_class: type[ConfigType], data: dict[str, Any], where: str) -> ConfigType:
    """Validate plain data; raises InputError with every problem, `where` naming the file."""
    try:
        return config_class.model_validate(data)
    except ValidationError as error:
        own = config_class.model_fields
        stages = [stage for stage, key in STAGES.items() if key in data]
        if stages and not any(key in own and key in data for key in STAGES.values()):
            raise InputError(
                f"{where}: is a config of flowmill {stages[0]}, expected one with the keys "
                f"{', '.join(name for name, field in own.items() if field.is_required())}"
            ) from error
        raise InputError(explain(error, config_class, where)) from error


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as {"a.b": value}."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}".lstrip("."))
    return flat


def differences(saved: Any, given: Any) -> dict[str, tuple[Any, Any]]:
    """{"section.key": (saved, given)} wherever two configs differ, or plain data that has them in it."""
    old, new = (
        flatten(side.model_dump(mode="json") if isinstance(side, Config) else side)
        for side in (saved, given)
    )
    pairs = {key: (old.get(key, "absent"), new.get(key, "absent")) for key in sorted(old | new)}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
