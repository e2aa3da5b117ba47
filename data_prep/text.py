"""Text from outside: names, captions, values and messages of others, which need not be valid Unicode."""

import codecs
import json
import math
from typing import Any

# Levels of lists and objects in JSON: others, which have less room on their stack, read it again.
MAX_DEPTH = 100
# The longer marks come first, since some begin with others.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# Bytes that a text has none of, but UTF-16 of most alphabets in every other place.
CONTROLS = bytes(set(range(32)) - set(b"\n\r"))


def encodable(text: str) -> str:
    """The text as one that UTF-8 can hold: what it cannot, lone surrogates, is U+FFFD.

    Every text from outside passes here once, where it enters, but for captions and the names by
    which a file is opened: those are bytes.
    """
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def encoding_of(data: bytes) -> str:
    """The encoding of a text that begins so: UTF-8, unless a mark or its control characters show another."""
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            return encoding
    halves = (data[1::2], data[0::2])
    low, high = (len(half) - len(half.translate(None, CONTROLS)) for half in halves)
    if len(data) % 2 == 0 and 4 * max(low, high) > len(data) and not low <= 2 * high <= 4 * low:
        return "utf-16-le" if low > high else "utf-16-be"
    return "utf-8-sig"


def parse_json(text: str | bytes) -> Any:
    """What JSON says, null for numbers that it has not: NaN and infinities; raises ValueError where it is none."""
    if isinstance(text, bytes):
        encoding = json.detect_encoding(text)
        text = text.decode(encoding, "surrogatepass" if "16" in encoding else "surrogateescape")
    try:
        value = json.loads(text, parse_constant=lambda _: None, parse_float=finite)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        outer = [each for each in level if isinstance(each, dict | list)]
        level = [inner for o in outer for inner in (o.values() if isinstance(o, dict) else o)]
    if level:
        raise ValueError("nested too deep")
    return value


def finite(number: Any) -> float | None:
    value = float(number)
    return value if math.isfinite(value) else None
