"""What every config builds on: its base class, and an error that says what is wrong with the user's input.

A module owns the config of what it configures; one YAML file per run holds them all. `models` is the
lowest layer, so the base lives here, where every other package may import it. Importing it imports pydantic
alone: each process that decodes pictures does.
"""

import difflib
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError


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


ConfigType = TypeVar("ConfigType", bound=Config)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Every config class that an annotation mentions, through unions, dicts and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models_in(part)]


def _locate(root: type[Config], location: tuple[int | str, ...]) -> tuple[str, list[str]]:
    """A pydantic location as the user's path, without unions' tags, and the names valid at its end."""
    models: list[type[BaseModel]] = [root]
    path = []
    for part in location[:-1]:
        fields = [model.model_fields[str(part)] for model in models if part in model.model_fields]
        tagged = [
            m
            for m in models
            if any(part in get_args(f.annotation) for f in m.model_fields.values())
        ]
        if fields:
            models = [model for field in fields for model in _models_in(field.annotation)]
        elif tagged:
            models = tagged
            continue
        path.append(str(part))
    names = sorted({name for model in models for name in model.model_fields})
    return ".".join([*path, str(location[-1])] if location else []), names


def explain(error: ValidationError, config_class: type[Config], where: str) -> str:
    """A pydantic error as one line per problem: path, got, expected, nearest valid name."""
    lines = []
    for item in error.errors():
        path, names = _locate(config_class, item["loc"])
        if item["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(item["loc"][-1]), names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"valid: {', '.join(names)}"
            lines.append(f"{where}: {path}: unknown key; {hint}")
        elif item["type"] == "missing":
            lines.append(f"{where}: {path}: missing; add it to the file or pass {path}=VALUE")
        else:
            got = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
            lines.append(
                f"{where}: {path or 'config'}: {item['msg'].removeprefix('Value error, ')}{got}"
            )
    return "\n".join(lines)


def parse_config(config_class: type[ConfigType], data: dict[str, Any], where: str) -> ConfigType:
    """Validate plain data; raises InputError with every problem, `where` naming the file."""
    try:
        return config_class.model_validate(data)
    except ValidationError as error:
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
