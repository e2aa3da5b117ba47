"""From a folder of pictures to drawn ones, through every stage's own command."""

import importlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from data_prep.schema import read_manifest
from models.config import InputError
from models.prompts import parse_class
from pipeline.arguments import parse_sampler, parse_size, read_prompts
from pipeline.inference.grid import grid
from pipeline.inference.sheet import begin_suite, read_suite
from pipeline.objectives.config import SamplerConfig
from pipeline.runs.trained import guided_by, open_trained
from pipeline.sample import main, parse_columns, read_recipe
from tests import train_factory


def sample(run: Path, *arguments: str, ranks: int = 1) -> Path:
    """The folder that `sample` wrote; alone, in this process, for a new one takes seconds to import."""
    steps = [] if "--like" in arguments else ["sampler.num_steps=4"]
    if ranks > 1:
        done = train_factory.run("pipeline.sample", str(run), *arguments, *steps, ranks=ranks)
        assert done.returncode == 0, done.stderr
        output = done.stdout
    else:
        app = typer.Typer()
        app.command()(main)
        output = (
            CliRunner().invoke(app, [str(run), *arguments, *steps], catch_exceptions=False).stdout
        )
    return Path(output.split(" to ")[1].split(": {")[0])


def read(folder: Path, prefix: str) -> np.ndarray:
    (path,) = folder.glob(f"{prefix}_*.png")
    return np.asarray(Image.open(path))


def test_training_draws_its_prompts_as_it_goes(trained_run):
    names = [f"step_{step:08d}.png" for step in (0, 60, 120)]
    assert sorted(p.name for p in (trained_run / "samples").glob("step_*.png")) == names
    events = EventAccumulator(str(trained_run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("at_a_glance/samples")] == [0, 60, 120]


def test_a_picture_says_how_it_was_made_and_is_made_again_from_that(trained_run, tmp_path):
    first = sample(
        trained_run, "--prompt", "red square", "--prompt", "a dog", "--output", str(tmp_path / "a")
    )
    info = json.loads(Image.open(next(first.glob("00001_a-dog.png"))).info["flowmill"])
    assert info["prompt"] == "a dog"
    assert (info["step"], info["weights"], info["num_steps"]) == (120, "ema", 4)
    again = sample(
        trained_run, "--prompt", "red square", "--prompt", "a dog", "--output", str(tmp_path / "b")
    )
    assert np.array_equal(read(first, "00001"), read(again, "00001"))
    assert Image.open(first / "grid.png").size[0] > 2 * 32


def test_prompts_weights_guidance_size_and_seed_reach_the_picture(trained_run, tmp_path):
    base = read(
        sample(trained_run, "--prompt", "red square", "--output", str(tmp_path / "base")), "00000"
    )
    changes = {
        "prompt": ["--prompt", "a dog"],
        "weights": ["--prompt", "red square", "--weights", "raw"],
        "step": ["--prompt", "red square", "--step", "60"],
        "guidance": ["--prompt", "red square", "sampler.guidance_scale=7"],
        "seed": ["--prompt", "red square", "sampler.seed=1"],
    }
    for name, arguments in changes.items():
        other = read(sample(trained_run, *arguments, "--output", str(tmp_path / name)), "00000")
        assert other.shape == base.shape
        assert not np.array_equal(other, base), name
    wide = sample(
        trained_run, "--prompt", "red square", "--size", "24x48", "--output", str(tmp_path / "wide")
    )
    assert read(wide, "00000").shape == (24, 48, 3)


def test_a_sheet_has_a_row_a_prompt_and_a_column_a_value_from_the_same_noise(trained_run, tmp_path):
    prompts = ("--prompt", "red square", "--prompt", "a dog")
    plain = sample(trained_run, *prompts, "--output", str(tmp_path / "plain"))
    columns = ("--columns", "guidance_scale=1,7", "--output", str(tmp_path / "sheet"))
    sheet = sample(trained_run, *prompts, *columns)
    paths = sorted(sheet.glob("0*.png"))
    recipes = [json.loads(Image.open(path).info["flowmill"]) for path in paths]
    cells = [("red square", 0, 1), ("red square", 0, 7), ("a dog", 1, 1), ("a dog", 1, 7)]
    assert [(r["prompt"], r["index"], r["guidance_scale"]) for r in recipes] == cells
    # Batches of another size round otherwise: one level at most.
    assert np.allclose(read(sheet, "00002"), read(plain, "00001"), atol=1)
    assert not np.allclose(read(sheet, "00003"), read(plain, "00001"), atol=1)
    width, height = Image.open(sheet / "grid.png").size
    assert width == 2 * (128 + 6) + 6  # two columns
    assert height > 2 * 128


def test_a_suite_is_drawn_in_the_layout_of_its_scorer(trained_run, tmp_path):
    lines = [{"tag": "colors", "prompt": "red square"}, {"tag": "counting", "prompt": "a dog"}]
    (tmp_path / "geneval.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    rows = 'item_id,text,question\nCOCO_1,"red square, small",is it red?\nCOCO_1,"red square, small",a square?\n7,a dog,a dog?\n'
    (tmp_path / "dpg.csv").write_text(rows)
    more = ("--images-per-prompt", "4")
    geneval = ("--suite", str(tmp_path / "geneval.jsonl"), "--output", str(tmp_path / "geneval"))
    folder = sample(trained_run, *geneval, *more)
    # What djghosh13/geneval's evaluate_images.py reads: each folder's one line, and every number.png of its samples.
    assert sorted(p.name for p in folder.iterdir()) == ["00000", "00001"]
    for number, line in enumerate(lines):
        assert json.loads((folder / f"{number:05d}" / "metadata.jsonl").read_text()) == line
        samples = sorted((folder / f"{number:05d}" / "samples").iterdir())
        assert [p.name for p in samples] == [f"{i:05d}.png" for i in range(4)]
        recipes = [read_recipe(path) for path in samples]
        assert [(r["prompt"], r["index"]) for r in recipes] == [
            (line["prompt"], 4 * number + i) for i in range(4)
        ]
    dpg = ("--suite", str(tmp_path / "dpg.csv"), "--output", str(tmp_path / "dpg"))
    folder = sample(trained_run, *dpg, *more)
    # What ELLA's compute_dpg_bench.py reads: a picture of 2 x 2 by the name of each item, and nothing else.
    assert sorted(p.name for p in (folder / "grids").iterdir()) == ["7.png", "COCO_1.png"]
    whole = np.asarray(Image.open(folder / "grids" / "7.png"))
    parts = [np.asarray(Image.open(folder / f"00001/samples/{i:05d}.png")) for i in range(4)]
    assert np.array_equal(whole, np.vstack([np.hstack(parts[:2]), np.hstack(parts[2:])]))
    with pytest.raises(InputError, match="is not empty"):
        begin_suite(folder, read_suite(tmp_path / "dpg.csv"), 4)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"prompt": "a dog"}\n{"text": "a cat"}\n', "KeyError('prompt')"),
        ("a.jsonl", '{"prompt": 3}\n', "no text"),
        ("a.jsonl", "a dog\n", "JSONDecodeError"),
        ("a.csv", "item_id,text\n../../x,a dog\n", "'../../x'"),
        ("a.csv", "id,text\n1,a dog\n", "KeyError('item_id')"),
    ],
)
def test_a_suite_that_cannot_be_read_is_refused(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError) as error:
        read_suite(tmp_path / name)
    assert message in str(error.value)
    with pytest.raises(InputError, match=r"none\.csv"):
        read_suite(tmp_path / "none.csv")


def test_a_picture_is_drawn_again_alone_from_what_it_says_of_itself(trained_run, tmp_path):
    options = ("--step", "60", "--size", "24x48", "sampler.name=euler_ancestral", "sampler.seed=5")
    prompts = ("--prompt", "red square", "--prompt", "a dog", "--weights", "raw")
    first = sample(trained_run, *prompts, *options, "--output", str(tmp_path / "first"))
    (picture,) = first.glob("00001_*.png")
    again = sample(trained_run, "--like", str(picture), "--output", str(tmp_path / "again"))
    assert np.allclose(read(again, "00000"), read(first, "00001"), atol=1)  # in a batch of one
    assert not np.allclose(read(first, "00000"), read(first, "00001"), atol=1)


def test_a_run_is_guided_by_its_own_earlier_checkpoint_or_other_average(trained_run, tmp_path):
    def drawn(name: str, *options: str) -> np.ndarray:
        words = ("--prompt", "red square", *options, "--output", str(tmp_path / name))
        return read(sample(trained_run, *words), "00000")

    plain = drawn("plain", "sampler.guidance_scale=3")
    for name, guide in (("earlier", "ema@60"), ("raw", "raw"), ("named", f"{trained_run}:raw")):
        led = drawn(name, "--guide", guide, "sampler.guidance_scale=3")
        assert not np.allclose(led, plain, atol=1), name
    assert np.array_equal(drawn("again", "--guide", "raw@120", "sampler.guidance_scale=3"), led)
    (picture,) = (tmp_path / "earlier").glob("00000_*.png")
    assert read_recipe(picture)["guide"] == "ema@60"
    again = sample(trained_run, "--like", str(picture), "--output", str(tmp_path / "like"))
    assert np.array_equal(read(again, "00000"), read(tmp_path / "earlier", "00000"))


@pytest.mark.parametrize(
    ("guide", "options", "message"),
    [
        ("raw@x", ["sampler.guidance_scale=3"], "expected NAME, NAME@STEP or RUN:NAME@STEP"),
        ("ema", ["sampler.guidance_scale=3"], "has the same weights"),
        ("nobody", ["sampler.guidance_scale=3"], "weights 'nobody'"),
        ("raw", [], "no effect at sampler.guidance_scale 1"),
    ],
)  # fmt: skip
def test_a_guide_that_cannot_guide_is_refused(trained_run, guide, options, message):
    with pytest.raises(InputError) as error:
        sample(
            trained_run, "--prompt", "a dog", "--guide", guide, "sampler.guidance_scale=1", *options
        )
    assert message in str(error.value)


def test_a_guide_of_other_latents_or_another_task_is_refused(trained_run, tmp_path):
    run = shutil.copytree(trained_run, tmp_path / "other")
    config = run / "config.yaml"
    (era,) = (p for p in (run / "eras").glob("*.json") if not p.name.startswith("epoch"))
    whole = config.read_text()
    config.write_text(whole.replace("prediction: flow", "prediction: sample"))
    trained = open_trained(trained_run, "ema", None)
    with pytest.raises(InputError, match="what the network computes: got prediction sample"):
        guided_by(trained, f"{run}:raw")
    config.write_text(whole)
    assert guided_by(trained, f"{run}:raw").guide is not None
    manifest = trained.manifest
    codec = manifest.codec.model_copy(update={"weights_sha256": "other"})
    other = manifest.model_copy(update={"codec": codec}).with_fingerprint()
    era.write_text(other.model_dump_json())
    with pytest.raises(InputError, match=r"codec\.weights_sha256: got other"):
        guided_by(trained, f"{run}:raw")


def test_a_picture_of_another_model_is_not_drawn_again_by_this_one(trained_run, tmp_path):
    first = sample(trained_run, "--prompt", "red square", "--output", str(tmp_path / "first"))
    (picture,) = first.glob("00000_*.png")
    recipe = json.loads(Image.open(picture).info["flowmill"])
    for changes in ({"step": 60}, {"weights": "raw"}, {"run": "other", "model_sha256": "0"}):
        info = PngInfo()
        info.add_itxt("flowmill", json.dumps(recipe | changes))
        Image.open(picture).save(tmp_path / "other.png", pnginfo=info)
        with pytest.raises(InputError, match="was drawn by another model"):
            sample(trained_run, "--like", str(tmp_path / "other.png"))
    with pytest.raises(InputError, match="expected a PNG that flowmill sample wrote"):
        sample(trained_run, "--like", str(trained_run / "samples" / "step_00000060.png"))


def test_what_is_not_there_is_named_with_what_is(trained_run, tmp_path, capsys):
    with pytest.raises(InputError, match="expected the folder of a training run"):
        sample(tmp_path, "--prompt", "x")
    arguments = [str(trained_run), "--prompt", "x", "--dry-run"]
    app = typer.Typer()
    app.command()(main)
    with pytest.raises(InputError, match=r"step_00000061: no such checkpoint.* of 60, 120"):
        app([*arguments, "--step", "61"], standalone_mode=False)
    app([*arguments, "--size", "40x40"], standalone_mode=False)
    assert (
        "no picture of 40x40 was trained on, but of 24x40, 32x32, 40x24" in capsys.readouterr().out
    )
    app([*arguments, "--size", "24x40"], standalone_mode=False)
    assert "no picture" not in capsys.readouterr().out


@pytest.mark.parametrize("command", ["sample", "evaluate", "export", "show_data"])
def test_a_dataset_and_encoders_that_have_moved_are_given_by_their_new_folders(
    trained_run, tmp_path, command, monkeypatch
):
    """The run's folder is a copy whose config names folders that are gone."""
    run, data = tmp_path / "run", trained_run.parent / "dataset"
    for part in ("checkpoints", "config.yaml"):
        (run / part).parent.mkdir(exist_ok=True)
        (run / part).symlink_to(trained_run / part)
    manifest = read_manifest(data)
    moved = {"data.path": tmp_path / "moved", "encoders.vae": tmp_path / "vae"}
    moved["encoders.text.bert"] = tmp_path / "text"
    for place, target in zip(
        moved.values(), (data, manifest.codec.path, manifest.text.roles["bert"].path), strict=True
    ):
        place.symlink_to(target)
    config = (trained_run / "config.yaml").read_text()
    (run / "config.yaml").unlink()
    (run / "config.yaml").write_text(config.replace(str(data), str(tmp_path / "gone")))
    more = {"sample": ["--prompt=x", "--dry-run"], "evaluate": ["--heldout=2"], "show_data": []}
    arguments = more.get(command, [str(tmp_path / "model")])
    app = typer.Typer()
    app.command()(importlib.import_module(f"pipeline.{command}").main)
    with pytest.raises(InputError, match="gone"):
        app([str(run), *arguments], standalone_mode=False)
    places = [f"{key}={place}" for key, place in moved.items()]
    app([str(run), *arguments, *places], standalone_mode=False)
    with pytest.raises(InputError, match=r"expected .*data\.path"):
        app([str(run), *arguments, *places, "model.size=B"], standalone_mode=False)


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_share_the_pictures_and_draw_the_same_ones(trained_run, tmp_path):
    prompts = [f"--prompt=picture {i}" for i in range(3)]
    one = sample(trained_run, *prompts, "--output", str(tmp_path / "one"))
    two = sample(trained_run, *prompts, "--output", str(tmp_path / "two"), ranks=2)
    assert [p.name for p in sorted(two.iterdir())] == [p.name for p in sorted(one.iterdir())]
    for i in range(3):
        assert np.allclose(read(one, f"{i:05d}"), read(two, f"{i:05d}"), atol=1)


def test_drawn_pictures_are_not_overwritten_unasked(trained_run, tmp_path):
    arguments = ("--prompt", "x", "--output", str(tmp_path / "out"))
    sample(trained_run, *arguments)
    with pytest.raises(InputError, match="holds pictures already"):
        sample(trained_run, *arguments)
    sample(trained_run, *arguments, "--overwrite")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tmp: read_prompts([], None), "no prompt"),
        (lambda tmp: read_prompts([], tmp / "absent.txt"), "absent.txt: no such file"),
        (lambda tmp: parse_size("12"), "HEIGHTxWIDTH"),
        (lambda tmp: parse_size("0x12"), "HEIGHTxWIDTH"),
        (lambda tmp: parse_sampler(SamplerConfig(), ["model.size=B"]), "sampler.key=value"),
        (lambda tmp: parse_sampler(SamplerConfig(), ["sampler.num_step=3"]), "'num_steps'"),
        (lambda tmp: parse_columns("seed", SamplerConfig()), "--columns"),
        (lambda tmp: parse_columns("sed=0,1", SamplerConfig()), "'seed'"),
        (lambda tmp: read_recipe(tmp / "absent.png"), "flowmill sample wrote"),
        (lambda tmp: parse_class("dog", 10), "a class from 0 to 9"),
        (lambda tmp: parse_class("10: dog", 10), "a class from 0 to 9"),
    ],
)
def test_what_is_wrong_with_the_arguments_is_said(call, message, tmp_path):
    with pytest.raises(InputError) as error:
        call(tmp_path)
    assert message in str(error.value)


def test_prompts_are_utf_8_with_or_without_a_byte_order_mark_one_per_line(tmp_path):
    file, text = tmp_path / "prompts.txt", "caf\u00e9\r\n\n a\u2028b \n"
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_bytes(text.encode(encoding))
        assert read_prompts(["first"], file) == ["first", "caf\u00e9", "a\u2028b"]
    for data, byte in (
        ("caf\u00e9".encode("cp1252"), "byte 3 is 0xe9"),
        ("cafe".encode("utf-16"), "byte 0 is 0xff"),
        ("cafe".encode("utf-16-le"), "byte 1 is 0x00"),
    ):
        file.write_bytes(data)
        with pytest.raises(InputError, match=f"prompts.txt: {byte}.*save it as UTF-8"):
            read_prompts([], file)


def test_a_grid_holds_every_picture_enlarged_and_labelled():
    pictures = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 32, 32) * 100
    sheet = np.asarray(
        grid(pictures, ["a", "b", "a long label of several words"], columns=2, cell=64)
    )
    assert tuple(sheet[6, 6]) == (0, 0, 0)
    assert tuple(sheet[6, 6 + 64 + 6]) == (100, 100, 100)
    assert (sheet == 200).all(axis=2).sum() == pytest.approx(64 * 64, rel=0.02)  # and bits of text


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_share_a_look_and_show_what_one_would(trained_run, tmp_path):
    options = ["training.images=8", "monitor.prompts=[one,two,three]", "engine.micro_batch=2"]
    options += ["monitor.heldout_samples=9", "engine.zero_stage=2"]
    for ranks in (1, 2):
        run = f"run={tmp_path / str(ranks)}"
        train_factory.train(trained_run.parent / "train.yaml", *options, run, ranks=ranks)
    sheets = [(tmp_path / str(n) / "samples/step_00000000.png").read_bytes() for n in (1, 2)]
    assert sheets[0] == sheets[1]
    for which in ("raw", "ema"):
        one, two = (
            train_factory.scalars(tmp_path / str(n), f"heldout_{which}/loss")[0] for n in (1, 2)
        )
        assert one == two
