"""Two habits that make text hard to read: "a" for "per", and docstrings that begin with "Of"."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NUMBER = (
    r"(?:\d[\d.,_]*\d|\d|\}(?= )|two|three|four|five|six|seven|eight|ten|hundred|thousand|million)"
)
UNIT = r"(?:bytes|bits|[um]?s|seconds?|[KMGT]i?B(?:/s)?|[MGT]?FLOPs?|[MGTP]FLOP/s)"
THING = (
    r"(?:batch|call|channel|column|copy|decoder|encoder|epoch|file|folder|head|image|layer|line|part"
    r"|picture|pod|prompt|rank|row|sample|shard|snapshot|state|step|token|value|vector|word|worker)"
)
THINGS = rf"(?:{THING}s|batches|copies)"
GAP = r"(?:[ _]|\s*\n\s*(?:\#\s*)?)"
PER_NOUN = rf"{GAP}(?-i:an?){GAP}[a-z]\w*"  # a capital begins another sentence
# A clause may follow its noun without "that" ("the rows a reader wants"), but not where nothing follows.
END = r"(?=\s*(?:[.,;:()\"'\]]|$|\n\s*\n|(?:and|at|is|are|or|may|in|over)\b))"
PER = re.compile(
    rf"(?<![\w.])(?:{NUMBER}(?:{GAP}(?:{UNIT}|{THING}|{THINGS}))?{PER_NOUN}"  # 4 bytes a parameter
    rf"|(?:an?|one){GAP}(?:\w+{GAP}){{0,2}}{THING}{PER_NOUN}"  # a row a sample
    rf"|(?:\w+_)?{UNIT}{PER_NOUN}"  # seconds a picture, bytes_a_picture
    rf"|{THINGS}{PER_NOUN}{END})",  # words a command.
    re.IGNORECASE,
)


def uses_of_a_for_per(text: str) -> list[tuple[int, str]]:
    """The line and the words of each "a" or "an" that stands for "per"."""
    return [
        (text.count("\n", 0, m.start()) + 1, " ".join(m[0].split())) for m in PER.finditer(text)
    ]


def docstrings_that_begin_with_of(source: str) -> list[tuple[int, str]]:
    """The line and the beginning of each, those under a field included."""
    strings = [
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    return [
        (string.lineno, string.value.strip()[:40])
        for string in strings
        if isinstance(string.value, str) and re.match(r"\s*Of\b", string.value)
    ]


@pytest.mark.parametrize(
    "text",
    [
        "16 bytes a parameter",
        "holds 16 a picture, in memory",
        "a row a sample, a column a value",
        "One line a machine, by name",
        "one catalog part a partition",
        "An image an epoch.",
        "ms a picture",
        "{batch / rate:.3f} s a step",
        "seconds_a_picture",
        "loader_cpu_us_a_sample",
        "pictures a GPU at once",
        "130 us a batch",
        "# some 600 bytes\n    # a file",
        "20 snapshots a width cannot express",
        "heads a level.",
        "1,000 a GPU and second",
    ],
)
def test_an_a_that_stands_for_per_is_found(text):
    assert uses_of_a_for_per(text)
    assert not uses_of_a_for_per(re.sub(r"([ _]|\n\s*# )an?(?=[ _])", r"\1per", text))


@pytest.mark.parametrize(
    "text",
    [
        "4 bytes per parameter",
        "in 3 of a thousand steps",
        "the bytes that a file holds",
        "the rows a reader wants",
        "half a surrogate pair",
        "at 8 is a step",
        "timeout: 600\n# An image",
        "1.0 being a picture",
        "draws a picture with a prompt",
        "the first of a row",
        "in a row",
        "three times a second",
        "once a second",
        "writes a file in a folder",
        "a class, an array",
        "version 2 as a number",
    ],
)
def test_an_a_that_is_an_article_is_left_alone(text):
    assert uses_of_a_for_per(text) == []


def test_a_docstring_that_begins_with_of_is_found_wherever_it_stands():
    source = 'def f():\n    """Of the whole."""\n\nclass C:\n    lr: float\n    """Of AdamW."""\n'
    assert [line for line, _ in docstrings_that_begin_with_of(source)] == [2, 6]
    good = 'def f():\n    """Offers a place."""\n    x = "Of the whole"\n'
    assert docstrings_that_begin_with_of(good) == []


def test_no_text_of_the_repository_has_either_habit():
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in done.stdout.split("\0")[:-1]]
    found: dict[str, list[str]] = {}
    for path in paths:
        name = str(path.relative_to(ROOT))
        if not path.is_file() or path == Path(__file__) or path.suffix in (".png", ".safetensors"):
            continue
        text = path.read_text()
        habits = uses_of_a_for_per(text)
        if path.suffix == ".py":
            habits += docstrings_that_begin_with_of(text)
        if habits:
            found[name] = [f"{name}:{line}: {words}" for line, words in sorted(habits)]
    lines = [words for name in sorted(found) for words in found[name]]
    assert not lines, "\n".join(['"per" is meant, or a docstring begins with "Of":', *lines])
