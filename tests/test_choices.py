"""What a run leaves out: its batches are those of a dataset that was prepared without it, from the next epoch on."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.preparation import prepare
from data_prep.schema import index_path, read_shard_table
from models.command import load_config
from models.config import InputError, parse_config
from pipeline.config import load_run_config
from pipeline.data.config import DataConfig
from pipeline.data.datasets import keys_and_captions
from pipeline.data.eras import ERAS, left_out_since
from pipeline.data.loader import Loader
from pipeline.inference.model_card import model_card
from pipeline.runs.trained import open_trained
from tests import train_factory
from tests.prep_factory import config_of_pictures
from tests.shard_factory import make_dataset, write_work
from tests.test_data import joined, numbers, take
from tests.test_layers import BELOW, PLAN, T5, WHOLE, assert_same, stack

SQUARE, WIDE = (32, 32), (16, 64)
BIG = [(SQUARE, 300), (WIDE, 200), (SQUARE, 260), (WIDE, 180), (SQUARE, 260)]
HELDOUT = [(SQUARE, 40), (WIDE, 24)]
GIVEN = {"global_batch": 16, "seed": 3}


def keys_of(numbers: list[int]) -> list[str]:
    return [f"{number:08d}" for number in numbers]


def write_scores(path: Path, scores: dict[int, float]) -> None:
    pq.write_table(pa.table({"key": keys_of(list(scores)), "beauty": list(scores.values())}), path)


def without(folder: Path, gone: set[int], first_epoch: int = 0, first_step: int = 0) -> Loader:
    """A loader over a dataset that was made without some pictures, whose first era begins there."""
    make_dataset(folder, BIG, heldout=HELDOUT, missing=gone)
    loader = Loader(DataConfig(path=str(folder)), **GIVEN)
    loader.eras.entries[0] |= {"epoch": first_epoch, "first_step": first_step}
    loader._era.cache_clear()
    loader.first = loader._era(0)
    return loader


class Run:
    """A run's ranks in this process, step by step; rank 0 settles first."""

    def __init__(self, config: DataConfig, eras: Path, ranks: int, start: int = 0):
        config = config.model_copy(update={"prefetch": 0})
        places = [(rank, ranks) for rank in range(ranks)]
        self.loaders = [Loader(config, **GIVEN, rank_of=place, eras=eras) for place in places]
        self.batches = [loader.batches(start) for loader in self.loaders]

    def take(self, count: int) -> list[list[int]]:
        steps = (tuple(next(batches) for batches in self.batches) for _ in range(count))
        return [joined(batches) for batches in steps]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_keys_and_a_range_of_scores_are_taken_up_at_an_epochs_beginning_on_any_number_of_ranks(
    tmp_path, ranks, capsys
):
    folder = write_work(make_dataset(tmp_path / "data", BIG, heldout=HELDOUT))
    rng = np.random.default_rng(0)
    scores = dict(enumerate(rng.uniform(0, 10, 1264).round(3).tolist()))
    ugly = {number for number, score in scores.items() if score < 1}
    uglier = {number for number, score in scores.items() if not 2 <= score <= 9.5}
    gone = set(rng.choice(1264, 500, replace=False).tolist())
    write_scores(tmp_path / "scores.parquet", scores)
    (tmp_path / "gone.txt").touch()
    config = DataConfig(
        path=str(folder),
        exclude=str(tmp_path / "gone.txt"),
        scores=str(tmp_path / "scores.parquet"),
        filters={"beauty": {"min": 1}},
    )
    eras, left_out = tmp_path / "eras", [ugly, ugly | gone, uglier | gone]
    # Two epochs, then one without 500 pictures, then two of another range.
    log, begins, predicted = list[list[int]](), [0], list[Loader]()
    for number, (epoch, epochs, out) in enumerate(
        [(0, 2, left_out[0]), (2, 1, left_out[1]), (3, 2, left_out[2])]
    ):
        loader = without(tmp_path / f"without{number}", out, epoch, begins[-1])
        predicted.append(loader)
        for later in range(epoch, epoch + epochs):
            begins.append(begins[-1] + loader.steps_per_epoch(later))
        log += [numbers(b) for b in take(loader, begins[-1] - len(log), len(log))]
    assert {n for step in log for n in step} == set(range(1200)) - ugly
    run = Run(config, eras, ranks)
    found = run.take(begins[1] + 9)
    (tmp_path / "gone.txt").write_text("\n".join([*keys_of(sorted(gone)), "no", "such", "key\n"]))
    found += run.take(begins[2] + 20 - len(found))
    assert "500 pictures left out" in capsys.readouterr().out
    # In the middle of the third epoch it goes on with another range, which waits for the fourth.
    other = parse_config(
        DataConfig, config.model_dump() | {"filters": {"beauty": {"min": 2, "max": 9.5}}}, "x"
    )
    found += Run(other, eras, ranks, len(found)).take(len(log) - len(found))
    assert found == log
    said = capsys.readouterr().out
    assert "data.exclude: 500 pictures left out; 3 of its 503 keys are of no picture" in said
    assert left_out_since(eras)[1].startswith("from epoch 2 on 500 by data.exclude, ")
    by_range = len((uglier | gone) - gone)
    assert (
        left_out_since(eras)[2]
        == f"from epoch 3 on 500 by data.exclude, {by_range} by data.filters.beauty"
    )
    # Whoever resumes in the middle of any epoch, with any number of ranks, is given the same.
    for begin, end in itertools.pairwise(begins):
        rest = log[(begin + end) // 2 : end + 5]
        for count in {1, ranks}:
            assert Run(other, eras, count, (begin + end) // 2).take(len(rest)) == rest
    # What is left out is not measured, in whichever epoch the run is.
    held = Loader(other, **GIVEN, eras=eras).heldout_batches(1000)
    expected = predicted[-1].heldout_batches(1000)
    assert [numbers(b) for b in held] == [numbers(b) for b in expected]
    # Where nothing is left out any more, all come back.
    plain = DataConfig(path=str(folder))
    back = Run(plain, eras, ranks, len(log))
    last = {n for step in back.take(-(-1200 // 16)) for n in step}
    assert len(last) > 1150
    assert last & gone


def test_a_stack_without_some_pictures_is_a_dataset_prepared_without_them(tmp_path):
    rng = np.random.default_rng(1)
    lacks, gone = (set(rng.choice(73, 10, replace=False).tolist()) for _ in range(2))
    base = write_work(make_dataset(tmp_path / "base", PLAN, BELOW, heldout=[(SQUARE, 6)]))
    t5 = make_dataset(tmp_path / "t5", PLAN, T5, base=base, heldout=[(SQUARE, 6)], missing=lacks)
    flat = make_dataset(tmp_path / "flat", PLAN, WHOLE, heldout=[(SQUARE, 6)], missing=lacks | gone)
    (tmp_path / "gone.csv").write_text(
        "\n".join(["why,key", *(f"x,{key}" for key in keys_of(sorted(gone)))])
    )
    config = stack(base, t5=t5).model_copy(update={"exclude": str(tmp_path / "gone.csv")})
    loaders = [Loader(c, global_batch=8, seed=1) for c in (config, DataConfig(path=str(flat)))]
    assert_same(*(take(loader, 25) for loader in loaders))
    assert_same(*(loader.heldout_batches(4) for loader in loaders))
    assert loaders[0].first.mixture.left_out == {"data.exclude": len(gone - lacks)}
    batch, mixture = next(loaders[0].batches()), loaders[0].first.mixture
    for number, sample in zip(numbers(batch), batch.sample_ids.tolist(), strict=True):
        assert mixture.locate(sample)["key"] == f"{number:08d}"


@pytest.mark.parametrize("missing", ["reject", "keep"])
def test_pictures_without_a_score_are_left_out_or_kept_as_the_range_says(tmp_path, missing):
    folder = write_work(make_dataset(tmp_path / "data", [(SQUARE, 40)]))
    lines = [
        f"{key},{score}"
        for key, score in zip(keys_of(range(30)), [*range(20), *["nan", ""] * 5], strict=True)
    ]
    (tmp_path / "s.csv").write_text("\n".join(["key,beauty", *lines]))
    ranges = {"beauty": {"min": 5, "missing": missing}}
    data = {"path": str(folder), "scores": str(tmp_path / "s.csv"), "filters": ranges}
    loader = Loader(parse_config(DataConfig, data, "x"), global_batch=1, seed=1)
    kept = {*range(5, 20), *(range(20, 40) if missing == "keep" else ())}
    assert {n for batch in take(loader, len(kept)) for n in numbers(batch)} == kept


def test_every_sample_of_a_picture_that_is_taken_out_goes_with_it(
    tmp_path, ray_address, vae_folder, text_folder
):
    """Two captions of each picture and of its mirror image; one shard planned more pictures than it has."""
    config = config_of_pictures(
        tmp_path, 24, vae_folder, text_folder, captions={"per_picture": 2}, images={"flip": True}
    )
    folder = Path(prepared(config))
    keys = pq.read_table(folder / "work" / "plan")["key"].to_pylist()
    gone = sorted(keys)[::5]
    (tmp_path / "gone.txt").write_text("\n".join(gone))
    data = DataConfig(path=str(folder), exclude=str(tmp_path / "gone.txt"), prefetch=0)
    loader = Loader(data, global_batch=1, seed=1)
    total = 4 * (len(keys) - len(gone))
    assert loader.steps_per_epoch(0) == total
    found = [loader.first.mixture.locate(int(b.sample_ids[0]))["key"] for b in take(loader, total)]
    assert sorted(found) == sorted(4 * [key for key in keys if key not in gone])


def prepared(config: Path) -> str:
    from data_prep.config import PrepareConfig

    settings = load_config(PrepareConfig, config, [])
    prepare(settings)
    return settings.output


def test_what_cannot_be_read_is_refused_at_the_start_and_told_of_later(tmp_path, caplog):
    folder = write_work(make_dataset(tmp_path / "data", [(SQUARE, 40)]))
    gone, scores = tmp_path / "gone.csv", tmp_path / "scores.parquet"
    config = DataConfig(path=str(folder), exclude=str(gone), prefetch=0)
    with pytest.raises(InputError, match=r"data.exclude: .*gone.csv: .*[Nn]o such file"):
        Loader(config, global_batch=8, seed=1)
    nowhere = config.model_copy(update={"exclude": "nosuch://x/gone.csv"})
    with pytest.raises(InputError, match=r"data.exclude: nosuch://x/gone.csv: .*nosuch"):
        Loader(nowhere, global_batch=8, seed=1)
    gone.write_text("name\n00000001\n")
    with pytest.raises(InputError, match=r"gone\.csv: got no column key"):
        Loader(config, global_batch=8, seed=1)
    pq.write_table(pa.table({"key": ["00000001"], "beauty": ["much"]}), scores)
    data = {"path": str(folder), "scores": str(scores), "filters": {"beauty": {"min": 1}}}
    with pytest.raises(InputError, match=r"data.scores: .*scores.parquet: .*much"):
        Loader(parse_config(DataConfig, data, "x"), global_batch=8, seed=1)
    gone.write_text("key\n00000001\n")
    batches = Loader(config, global_batch=8, seed=1, eras=tmp_path / "eras").batches()
    log = [numbers(next(batches)) for _ in range(4)]
    eras = Loader(config, global_batch=8, seed=1, eras=tmp_path / "eras").eras
    assert eras._next() is eras._next()
    first = Loader(config, global_batch=8, seed=1).eras
    assert first._next() is first.now
    gone.write_text("name\n00000002\n")
    log += [numbers(next(batches)) for _ in range(5)]
    assert "not taken up, the run goes on with what it has" in caplog.text
    assert {n for step in log for n in step} == set(range(40)) - {1}
    gone.write_text("key\n00000001\n")
    for name in ("shard_list.parquet", "plan/000000.parquet"):
        (folder / "work" / name).unlink()
        with pytest.raises(
            InputError, match=f"{folder}: its work/ and .*Remedy: copy {folder}/work"
        ):
            Loader(config, global_batch=8, seed=1)
    write_work(make_dataset(tmp_path / "other", [(SQUARE, 39)]))
    (tmp_path / "other" / "work").rename(folder / "other")
    (folder / "work").rename(tmp_path / "old")
    (folder / "other").rename(folder / "work")
    with pytest.raises(InputError, match="work/ knows 39 pictures of it, expected 40"):
        Loader(config, global_batch=8, seed=1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"scores": "s.csv"}, "scores, filters: got one of the two"),
        ({"filters": {"beauty": {"min": 1}}}, "scores, filters: got one of the two"),
        ({"scores": "s.csv", "filters": {"beauty": {}}}, "expected min, max or both"),
        ({"scores": "s.csv", "filters": {"beauty": {"min": 2, "max": 1}}}, "min 2 is over max 1"),
    ],
)
def test_ranges_and_scores_that_say_nothing_are_refused(data, message):
    with pytest.raises(InputError, match=message):
        parse_config(DataConfig, data | {"path": "x"}, "x")


def test_an_evaluation_does_not_measure_what_is_left_out_and_the_card_says_it(
    trained_run, tmp_path
):
    run = Path(shutil.copytree(trained_run, tmp_path / "run"))
    data = Path(load_run_config(run).data.path or "")
    heldout = [row["split"] == "heldout" for row in read_shard_table(data).to_pylist()]
    paths = read_shard_table(data).filter(heldout)["path"].to_pylist()
    keys = [
        key for path in paths for key, _ in keys_and_captions(data / path, data / index_path(path))
    ]
    (tmp_path / "gone.txt").write_text("\n".join(keys[:3]))
    overrides = [f"data.exclude={tmp_path / 'gone.txt'}", "--heldout", "1000"]
    done = train_factory.run(
        "pipeline.evaluate", str(run), *overrides, "--output", str(tmp_path / "out")
    )
    assert done.returncode == 0, done.stderr
    (measured,) = (tmp_path / "out").glob("*/measurements.json")
    (figures,) = json.loads(measured.read_text())
    assert figures["measured_with"]["num_pictures"] == len(keys) - 3
    settled = run / ERAS / "epoch_00000000.json"
    settled.write_text(
        json.dumps(json.loads(settled.read_text()) | {"left_out": {"data.exclude": 3}})
    )
    card = model_card(open_trained(run, "ema", None), tmp_path, "fp32", ["diffusers", "x"], "mine")
    assert "Pictures left out: from epoch 0 on 3 by data.exclude." in card
