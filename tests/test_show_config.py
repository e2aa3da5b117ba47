"""Configs shown, compared, and described to editors."""

from pathlib import Path

import jsonschema
import pytest
import yaml

from data_prep.schema import MANIFEST, read_manifest
from models.command import read_yaml
from models.config import STAGES, InputError
from pipeline.show_config import json_schema, main, read_config
from tests.shard_factory import make_dataset

CONFIG_FOLDER = Path(__file__).parent.parent / "configs"
FILES = sorted(p for p in CONFIG_FOLDER.glob("*.yaml") if p.name != "objectives.yaml")
DEMO = CONFIG_FOLDER / "demo_train.yaml"


def stage_of(tree: dict) -> str:
    return next(stage for stage, key in STAGES.items() if key in tree)


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
    changed = read_yaml(DEMO, ["seed=9", "engine.zero_stage=3", "run=/else/where"])
    other.write_text(yaml.safe_dump(changed))
    main("diff", [str(DEMO), str(other)])
    assert capsys.readouterr().out.splitlines() == [
        "engine.zero_stage: 0 -> 3  (changes speed)",
        f"run: '{Path('outputs/demo/run').absolute()}' -> '/else/where'  (changes neither results nor speed)",
        "seed: 0 -> 9  (changes results)",
    ]
    main("diff", [str(DEMO), str(DEMO)])
    assert "no difference" in capsys.readouterr().out


def test_what_a_run_resolved_is_no_difference_and_every_other_key_is_shown_whole(tmp_path, capsys):
    resolved = ["model.latent_channels=4", "model.text_dim=384", "model.pooled_dim=384"]
    resolved += ["engine.precision=bf16", "engine.compile=false"]
    main("show", [str(DEMO), *resolved])
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    for pair in ([str(DEMO), str(tmp_path)], [str(tmp_path), str(DEMO)]):
        main("diff", pair)
        assert capsys.readouterr().out == "no difference\n"
    # However narrow the terminal is, and whatever a value holds.
    run = f"/[red]:-1:[/] {'x' * 300}"
    main("show", [str(DEMO), *resolved, f"run={run!r}"])
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    main("diff", [str(DEMO), str(tmp_path)])
    assert f"-> {run!r}" in capsys.readouterr().out


def test_a_dataset_s_config_is_shown_and_compared_with_the_yaml_that_it_was_made_by(
    tmp_path, capsys
):
    yaml_file = CONFIG_FOLDER / "prepare_folder.yaml"
    config = read_config(yaml_file, []).model_dump(mode="json", exclude={"output", "ray"})
    folder = make_dataset(tmp_path / "data", [((32, 32), 4)])
    manifest = read_manifest(folder).model_copy(update={"prepare_config": config})
    (folder / MANIFEST).write_text(manifest.with_fingerprint().model_dump_json())
    main("diff", [str(folder), str(yaml_file)])
    assert capsys.readouterr().out == "no difference\n"
    (tmp_path / "other.yaml").write_text(
        yaml.safe_dump(config | {"samples_per_shard": 7, "output": "o"})
    )
    main("diff", [str(tmp_path / "other.yaml"), str(folder)])
    assert capsys.readouterr().out == "samples_per_shard: 7 -> 1000\n"
    main("show", [str(folder)])
    assert yaml.safe_load(capsys.readouterr().out)["images"] == config["images"]


@pytest.mark.parametrize(
    ("action", "arguments", "message"),
    [
        ("schema", ["trian"], "expected one of train, prepare, fit-vae"),
        ("diff", [str(DEMO)], "got 1 names, expected 2"),
        ("show", [str(CONFIG_FOLDER / "demo_tain.yaml")], f"Did you mean {CONFIG_FOLDER}/demo_train.yaml"),
        ("diff", [str(DEMO), str(CONFIG_FOLDER / "demo_prepare.yaml")], "different stages"),
        ("show", [str(CONFIG_FOLDER / "objectives.yaml")], "expected one of training (train)"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused(action, arguments, message):
    with pytest.raises(InputError) as error:
        main(action, arguments)
    assert message in str(error.value)
