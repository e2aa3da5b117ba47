"""What the fields of a picture's metadata must be: a range of numbers, or one of some values."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, FiniteFloat, model_validator

from models.config import Config, InputError


class MetadataFilter(Config):
    """What one field must be: a number from `min` to `max`, or one of some values."""

    min: FiniteFloat | None = None
    max: FiniteFloat | None = None
    one_of: tuple[str | bool | int | float, ...] | None = Field(default=None, min_length=1)
    missing: Literal["reject", "keep"] = "reject"
    """What becomes of a picture that lacks the field; NaN and infinities count as lacking."""

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if (self.min is None and self.max is None) == (self.one_of is None):
            raise ValueError("expected min, max or both, or else one_of")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is over max {self.max:g}")
        return self

    def wanted(self) -> str:
        """What is taken, in words."""
        if self.one_of is not None:
            return f"one of {', '.join(map(repr, self.one_of))}"
        ends = {"from": self.min, "to": self.max}
        return "a number " + " ".join(f"{w} {e:g}" for w, e in ends.items() if e is not None)

    def fits(self, value: Any) -> bool:
        """Whether it is a value of the kind that is asked for."""
        if self.one_of is not None:
            return isinstance(value, str | int | float)
        return isinstance(value, int | float) and not isinstance(value, bool)

    def takes(self, value: Any) -> bool:
        if value is None:
            return self.missing == "keep"
        if self.one_of is not None:
            return value in self.one_of
        if not self.fits(value):
            return False
        return (self.min is None or value >= self.min) and (self.max is None or value <= self.max)

    def takes_numbers(self, values: np.ndarray) -> np.ndarray:
        """Which of some numbers are taken, bool (n,); NaN and infinities count as lacking."""
        if self.one_of is not None:
            taken = np.isin(values, [one for one in self.one_of if not isinstance(one, str)])
        else:
            low = -np.inf if self.min is None else self.min
            taken = (values >= low) & (values <= (np.inf if self.max is None else self.max))
        return np.where(np.isfinite(values), taken, self.missing == "keep")


def refusal(facts: Mapping[str, Any], filters: Mapping[str, MetadataFilter]) -> str:
    """Why the first filter that does not take a picture's metadata does not; "" where all do."""
    for name, wanted in filters.items():
        value = facts.get(name)
        if not wanted.takes(value):
            got = "nothing" if value is None else repr(value)
            return f"{name}: got {got}, expected {wanted.wanted()}"[:300]
    return ""


def check_fields(texts: Iterable[str], filters: Mapping[str, MetadataFilter]) -> None:
    """Raises InputError where a filter's field is in no picture's metadata (JSON), or never of its kind."""
    left, fields, misfits = dict(filters), Counter[str](), dict[str, Any]()
    for text in texts:
        if not left:
            return
        facts = {n: value for n, value in json.loads(text or "{}").items() if value is not None}
        fields.update(facts.keys())
        for name in left.keys() & facts.keys():
            if left[name].fits(facts[name]):
                del left[name]
            else:
                misfits.setdefault(name, facts[name])
    for name, wanted in left.items():
        kind = "number" if wanted.one_of is None else "text or number"
        seen = ", ".join(field for field, _ in fields.most_common(20)) or "no metadata at all"
        got = repr(misfits[name]) if name in misfits else f"of all fields {seen}"
        raise InputError(
            f"filters.metadata.{name}: no picture has a {kind} there; got {got}, expected {wanted.wanted()}. Remedy: "
            "--restart with another name, or one_of for texts."
        )
