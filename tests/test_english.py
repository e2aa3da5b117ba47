"""Two habits that make text hard to read: "a" for "per", and docstrings that begin with "Of"."""

import ast
import re

from tests.test_structure import ROOT, tracked

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


def uses_of_a_for_per(text: str) -> list[str]:
    """The line and the words of each "a" or "an" that stands for "per"."""
    return [
        f"{text.count(chr(10), 0, m.start()) + 1}: {' '.join(m[0].split())}"
        for m in PER.finditer(text)
    ]


def docstrings_that_begin_with_of(source: str) -> list[str]:
    """The line and the beginning of each, those under a field included."""
    strings = [n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Expr)]
    return [
        f"{string.lineno}: {string.value.strip()[:40]}"
        for string in strings
        if isinstance(string, ast.Constant) and re.match(r"\s*Of\b", str(string.value))
    ]


PER_THING = ["16 bytes a parameter", "a row a sample, a column a value", "An image an epoch.",
             "{batch / rate:.3f} s a step", "loader_cpu_us_a_sample", "# some 600 bytes\n    # a file", "heads a level."]  # fmt: skip
ARTICLES = ["in 3 of a thousand steps", "the rows a reader wants", "at 8 is a step", "timeout: 600\n# An image",
            "draws a picture with a prompt", "in a row", "three times a second", "a class, an array"]  # fmt: skip


def test_an_a_that_stands_for_per_is_found_and_an_article_left_alone():
    for text in PER_THING:
        assert uses_of_a_for_per(text), text
        assert not uses_of_a_for_per(re.sub(r"([ _]|\n\s*# )an?(?=[ _])", r"\1per", text)), text
    for text in ARTICLES:
        assert uses_of_a_for_per(text) == []


def test_a_docstring_that_begins_with_of_is_found_wherever_it_stands():
    source = 'def f():\n    """Of the whole."""\n\nclass C:\n    lr: float\n    """Of AdamW."""\n'
    assert docstrings_that_begin_with_of(source) == ["2: Of the whole.", "6: Of AdamW."]
    good = 'def f():\n    """Offers a place."""\n    x = "Of the whole"\n'
    assert docstrings_that_begin_with_of(good) == []


def test_no_text_of_the_repository_has_either_habit():
    found = []
    for path in tracked():
        if path.name != "test_english.py":
            text = path.read_text()
            habits = uses_of_a_for_per(text)
            habits += docstrings_that_begin_with_of(text) if path.suffix == ".py" else []
            found += [f"{path.relative_to(ROOT)}:{habit}" for habit in habits]
    assert found == [], "\n".join(['"per" is meant, or a docstring begins with "Of":', *found])
