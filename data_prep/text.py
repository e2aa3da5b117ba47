"""Text from outside: names, captions, values and messages of others, which need not be valid Unicode."""

import json
from collections.abc import Iterable
from typing import Any

# Levels of lists and objects in JSON: others, which have less room on their stack, read it again.
MAX_DEPTH = 100


def encodable(text: str) -> str:
    """The text as one that UTF-8 can hold: what it cannot, lone surrogates, is U+FFFD.

    Every text from outside passes here once, where it enters, but for captions and the names by
    which a file is opened: those are bytes.
    """
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def parse_json(text: str | bytes) -> Any:
    """What JSON says; raises ValueError where it is none."""
    try:
        value = json.loads(text, parse_constant=lambda _: None)  # NaN is no JSON
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    level, depth = [value], 0
    while level := [inner for outer in level for inner in _inside(outer)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError("nested too deep")
    return value


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
