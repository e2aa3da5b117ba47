"""What a user reads where something is wrong or foreign: plain words, choices by name, texts as they are."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel
from rich.table import Table

from data_prep.config import FitVaeConfig, PrepareConfig
from models.command import load_config, plain_console
from models.config import Config, InputError, _models_in, parse_config
from pipeline.config import TrainConfig
from tests import train_factory
from tests.test_text_encoder import save_encoder

ROOT = Path(__file__).parent.parent
SOURCES = {"a": {"kind": "folder", "path": "p"}}
SOUND: dict[type[Config], dict[str, Any]] = {
    TrainConfig: {"data": {"path": "x"}, "training": {"images": 100}, "run": "r"},
    PrepareConfig: {"sources": SOURCES, "vae": {"path": "v"}, "output": "o"},
    FitVaeConfig: {"sources": SOURCES, "output": "o", "steps": 3},
}
WRONG = ("nonsense", -3, 1e9, True, None, [1], [["x"]], {}, {"kind": "zzz"}, {"kind": 3}, {"a": 1})
JARGON = re.compile("[Dd]iscriminator|[Tt]agged|Input |instance of|class |union|extract|dictionary")


def fields(model: type[BaseModel], depth: int = 3) -> Iterator[tuple[list[str], list[str]]]:
    """Every field of a config as its path, and the kinds that its section may be of."""
    for name, field in model.model_fields.items():
        inner = _models_in(field.annotation)
        named = "dict[" in str(field.annotation)
        fields_of_kind = [m.model_fields["kind"] for m in inner if "kind" in m.model_fields]
        kinds = [kind for f in fields_of_kind for kind in get_args(f.annotation)]
        yield [name, "a"][: 1 + named], kinds
        if depth:
            for each in inner:
                yield from (([name, *path], kinds) for path, kinds in fields(each, depth - 1))


def changed(data: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """Plain data with a value at a path."""
    first, *rest = path
    inner = data.get(first)
    inner = inner if isinstance(inner, dict) else {}
    return data | {first: changed(inner, rest, value) if rest else value}


@pytest.mark.parametrize("config", SOUND, ids=lambda c: c.__name__)
def test_a_wrong_value_anywhere_is_named_in_plain_words_with_the_kinds_that_there_are(config):
    for path, kinds in fields(config):
        for value in WRONG:
            try:
                parse_config(config, changed(SOUND[config], path, value), "file.yaml")
                continue
            except InputError as error:
                said = str(error)
            assert all(line.startswith("file.yaml: ") for line in said.splitlines())
            assert not JARGON.search(said.replace(repr(value), "")), said
            if kinds and value == {"kind": "zzz"}:
                (line,) = (x for x in said.splitlines() if f"{'.'.join(path)}.kind: " in x)
                assert all(kind in line for kind in ("got 'zzz'", *kinds)), line


def test_a_config_of_another_stage_is_recognised_as_such_in_one_line(tmp_path):
    files = {
        TrainConfig: ROOT / "configs/demo_train.yaml",
        PrepareConfig: ROOT / "configs/demo_prepare.yaml",
        FitVaeConfig: ROOT / "configs/fit_vae_openmoji.yaml",
    }
    stages = dict(zip(files, ("train", "prepare", "fit-vae"), strict=True))
    for config in files:
        for other, file in files.items():
            if other is config:
                load_config(config, file, [])
                continue
            with pytest.raises(InputError) as error:
                load_config(config, file, [])
            if {config, other} == {PrepareConfig, FitVaeConfig}:
                continue  # Both have sources; what each lacks is said.
            assert f"is a config of flowmill {stages[other]}" in str(error.value)
            assert len(str(error.value).splitlines()) == 1
    with pytest.raises(InputError, match="is a folder, expected a YAML file"):
        load_config(TrainConfig, tmp_path, [])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"author: Jos\xe9\n", "byte 11 is not UTF-8"),
        (b"a: {b: 1\nc: 2\n", "line 2"),
        (b"a: [1, 2\n", "line 2"),
        (b"a: b: c\n", "line 1, column 5"),
        (b"\tx: 1\n", "line 1"),
        (b"- 1\n", "expected a mapping of sections"),
        (b"3\n", "a.yaml"),
        (b"hello\n", "hello: unknown key"),
        (b"data: \x00\n", "no YAML"),
    ],
)
def test_a_file_that_is_no_yaml_is_named_with_the_place(tmp_path, data, message):
    (tmp_path / "a.yaml").write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        load_config(TrainConfig, tmp_path / "a.yaml", [])
    assert "a.yaml" in str(error.value)


FOREIGN = "[red] [/] :-1: :smile: a[b \\[x] [bold]y[/bold] [[1]] \\"


def test_a_foreign_text_is_printed_as_it_is(tmp_path, capsys):
    table = Table(FOREIGN, title=FOREIGN)
    table.add_row(FOREIGN)
    plain_console().print(table)
    plain_console().print(f"got {FOREIGN}")
    assert capsys.readouterr().out.count(FOREIGN) == 4


def test_a_path_is_printed_as_it_is_even_where_it_is_no_text(tmp_path):
    name = os.fsdecode(FOREIGN.replace("/", "").encode() + b"\xff.yaml")
    done = train_factory.run("pipeline.cli", "config", "show", name, cwd=tmp_path)
    assert done.returncode == 2
    shown = name.replace("\udcff", "\\udcff")
    assert done.stderr == f"error {shown}: no such config file.\n"
    (tmp_path / name).write_text((ROOT / "configs" / "demo_train.yaml").read_text())
    done = train_factory.run("pipeline.cli", "config", "show", f"x{name}", cwd=tmp_path)
    assert done.stderr == f"error x{shown}: no such config file. Did you mean {shown}?\n"


def test_a_damaged_shard_ends_training_with_one_sentence(tmp_path):
    config = train_factory.write_config(tmp_path)
    for path in (tmp_path / "dataset" / "shards").glob("*/*.tar"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    (sentence,) = [x for x in train_factory.train(config, status=2).splitlines() if "error" in x]
    assert re.search(r"error .*shards/.*cannot be used: .*sha256 got", sentence)


LOAD = """
import sys
from models.config import InputError
from models.text_conventions import View
from models.text_encoder import TextEncoder

for folder in sys.argv[1:]:
    try:
        TextEncoder(folder, View(max_length=8))
    except InputError as error:
        print(error)
"""


def test_an_encoder_s_weights_of_another_config_are_named_without_the_library_s_report(tmp_path):
    """In a process of its own: transformers writes to the stream that it found when it was imported."""
    changes = {"bert": {"hidden_size": 32}, "clip": {"num_hidden_layers": 3}, "t5": {"d_model": 32}}
    folders = [save_encoder(tmp_path / kind, kind) for kind in changes]
    for folder, changed in zip(folders, changes.values(), strict=True):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changed))
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, folders)],
        capture_output=True,
        text=True,
        env=train_factory.environment(),
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done
    for line, folder in zip(lines, folders, strict=True):
        assert line.startswith(f"{folder}: its weights are not those of its config.json: ")
    assert "REPORT" not in done.stderr
