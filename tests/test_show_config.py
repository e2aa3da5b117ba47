"""Configs shown, compared, and described to editors."""

from pathlib import Path

import jsonschema
import pytest
import yaml

from models.command import read_yaml
from models.config import InputError
from pipeline.show_config import CONFIGS, json_schema, main, read_config

CONFIG_FOLDER = Path(__file__).parent.parent / "configs"
FILES = sorted(p for p in CONFIG_FOLDER.glob("*.yaml") if p.name != "objectives.yaml")
DEMO = CONFIG_FOLDER / "demo_train.yaml"


def stage_of(tree: dict) -> str:
    return next(stage for stage, (key, _) in CONFIGS.items() if key in tree)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_every_config_shipped_loads_and_fits_its_schema(path):
    read_config(path, [])
    tree = read_yaml(path, [])
    schema = json_schema(stage_of(tree))
    jsonschema.validate(tree, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree | {"sede": 1}, schema)


def test_a_wrong_preset_does_not_fit_the_schema():
    tree = read_yaml(DEMO, ["objective={preset: sd4}"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree, json_schema("train"))


def test_what_is_shown_loads_to_the_same_config(tmp_path, capsys):
    main("show", [str(DEMO), "seed=7"])
    shown = tmp_path / "config.yaml"
    shown.write_text(capsys.readouterr().out)
    assert yaml.safe_load(shown.read_text())["seed"] == 7
    # A run's folder holds such a file.
    assert read_config(tmp_path, []) == read_config(DEMO, ["seed=7"])


def test_a_difference_says_what_it_changes(tmp_path, capsys):
    other = tmp_path / "other.yaml"
    changed = read_yaml(DEMO, ["seed=9", "engine.zero_stage=3", "run=elsewhere"])
    other.write_text(yaml.safe_dump(changed))
    main("diff", [str(DEMO), str(other)])
    lines = capsys.readouterr().out.splitlines()
    found = {w[0]: w[-1] for line in lines if len(w := line.strip("│ ").split()) >= 4}
    assert (
        found.items() >= {"seed": "results", "engine.zero_stage": "speed", "run": "neither"}.items()
    )
    main("diff", [str(DEMO), str(DEMO)])
    assert "no difference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("action", "arguments", "message"),
    [
        ("schema", ["trian"], "expected one of train, prepare, fit-vae"),
        ("diff", [str(DEMO)], "got 1 names, expected 2"),
        ("show", [str(CONFIG_FOLDER / "demo_tain.yaml")], "Did you mean demo_train.yaml"),
        ("diff", [str(DEMO), str(CONFIG_FOLDER / "demo_prepare.yaml")], "different stages"),
        ("show", [str(CONFIG_FOLDER / "objectives.yaml")], "expected one of training (train)"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused(action, arguments, message):
    with pytest.raises(InputError) as error:
        main(action, arguments)
    assert message in str(error.value)
