"""Training as real processes: it learns, is killed, resumes bit for bit, stops on a signal, refuses."""

import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data_prep.schema import read_manifest
from models.command import load_config
from models.config import InputError
from pipeline.config import TrainConfig, dump_config, load_run_config
from pipeline.data.randomness import draw_dropout
from pipeline.runs.setup import check_run, fit_run
from pipeline.runs.trained import open_trained
from pipeline.training.checkpoint import newest_sound
from pipeline.training.rejection import Rejection
from tests import train_factory
from tests.forked import alive, wait_until
from tests.shard_factory import Kind, make_dataset
from tests.train_factory import histograms, scalars, train, unlike, workers, write_config

pytestmark = pytest.mark.distributed
MUON, OFFLOAD = ["optimizer.kind=muon"], ["engine.offload_optimizer=cpu"]
OFFLOAD_ALL = [*OFFLOAD, "engine.offload_parameters=cpu"]
FAST = [(2, "bf16", MUON)]
ALL = [
    (stage, dtype, more) for stage in range(4) for dtype in ("fp32", "bf16") for more in ([], MUON)
]
ALL += [(1, "fp32", OFFLOAD), (2, "bf16", OFFLOAD)]
ALL += [(3, "bf16", OFFLOAD_ALL)]


def kill(tmp_path: Path, config: Path, after: str, ranks: int, *options: str) -> None:
    """SIGKILL every process of a run after it said so."""
    launch = train_factory.torchrun if ranks > 1 else train_factory.start
    process = launch("pipeline.train", str(config), *options, ranks=ranks)
    train_factory.wait_for(process, after)
    for pid in {process.pid, *workers(process)}:
        os.kill(pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(
    ("stage", "dtype", "more"),
    [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in FAST)],
)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, stage, dtype, more):
    # Stage 0 in bf16 sums no micro-batches.
    options = [f"engine.zero_stage={stage}", f"engine.precision={dtype}", *more]
    options += [f"engine.micro_batch={4 if (stage, dtype) == (0, 'bf16') else 2}"]
    whole, killed = write_config(tmp_path, "whole"), write_config(tmp_path, "killed")
    done = train_factory.run("pipeline.train", str(whole), *options, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "is deprecated" not in done.stderr
    kill(tmp_path, killed, "step_00000012, for which", 2, *options)
    output = train(killed, *options, ranks=2)
    assert re.search("resuming at step 1[28] of 24", output)
    assert unlike(tmp_path / "killed", tmp_path / "whole") == []
    losses = [value for _, value in scalars(tmp_path / "whole", "loss/train")]
    assert len(losses) == 24


LOGGED = ["monitor.every_steps=4", "engine.zero_stage=1", "engine.micro_batch=2"]


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> Path:
    """The folder of a whole run with these options on two ranks."""
    folder = tmp_path_factory.mktemp("logged")
    train(write_config(folder, "whole"), *LOGGED, ranks=2)
    return folder


@pytest.mark.parametrize(
    ("after", "by"),
    [
        ("step 4/", signal.SIGKILL),
        pytest.param("step_00000006, for which", signal.SIGKILL, marks=pytest.mark.slow),
        ("step 12/", signal.SIGTERM),
    ],
)
def test_what_is_logged_after_a_resume_is_of_the_same_steps(logged, tmp_path, after, by):
    (tmp_path / "dataset").symlink_to(logged / "dataset")
    killed = write_config(tmp_path, "killed")
    process = train_factory.start("pipeline.train", str(killed), *LOGGED, ranks=2)
    train_factory.wait_for(process, after)
    for pid in workers(process):
        os.kill(pid, by)
    assert process.stdout is not None
    process.stdout.read()
    process.wait()
    train(killed, *LOGGED, ranks=2)
    whole, killed = logged / "whole", tmp_path / "killed"
    for tag in ("loss/train", "loss_by_noise_level/x0_mse_t_0.5625", "optimizer/lr"):
        assert scalars(killed, tag) == scalars(whole, tag), tag
    assert [step for step, _ in scalars(killed, "loss/train")] == list(range(4, 25, 4))
    assert histograms(killed, "log_snr") == histograms(whole, "log_snr")


def test_rejected_steps_that_are_taken_again_are_noted_once(tmp_path):
    state = {"total": 2, "in_a_row": 0, "recent": []}
    (tmp_path / "rejected.jsonl").write_text("one\ntwo\nthree\n")
    config = load_config(TrainConfig, write_config(tmp_path), [f"run={tmp_path}"])
    Rejection(config, None, SimpleNamespace(num_taken=0)).load(state)  # pyright: ignore[reportArgumentType]
    assert (tmp_path / "rejected.jsonl").read_text() == "one\ntwo\n"


def test_fifty_losses_are_the_same_on_one_rank_and_on_two_however_the_batch_is_cut(tmp_path):
    for name, ranks, micro_batch in (("one", 1, 2), ("two", 2, 4)):
        options = ["engine.zero_stage=1", f"engine.micro_batch={micro_batch}"]
        options += ["training.images=400", "checkpoint.every_steps=50"]
        train(write_config(tmp_path, name), *options, ranks=ranks)
    one, two = (dict(scalars(tmp_path / name, "loss/train")) for name in ("one", "two"))
    assert list(one) == list(two) == list(range(1, 51))
    for step, loss in one.items():
        assert loss == pytest.approx(two[step], rel=1e-5), step  # another order of summing


@pytest.mark.slow
@pytest.mark.parametrize("is_read", [True, False])
def test_workers_leave_when_their_launcher_is_killed_though_nobody_reads_them(tmp_path, is_read):
    config = write_config(tmp_path)
    process = train_factory.torchrun(
        "pipeline.train", str(config), "training.images=800000", ranks=2
    )
    train_factory.wait_for(process, "step 3/")
    ranks = workers(process)
    assert len(ranks) == 2
    if not is_read:
        process.stdout.close()
    process.kill()
    wait_until(lambda: not any(map(alive, ranks)), 30, "orphans run on")


@pytest.mark.slow
def test_torchrun_starts_all_ranks_again_when_one_is_killed(tmp_path):
    options = (str(write_config(tmp_path)), "training.images=800000", "optimizer.warmup_images=0")
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PET_MAX_RESTARTS": "1"}
    process = train_factory.torchrun("pipeline.train", *options, ranks=2, **own_store)
    train_factory.wait_for(process, "step 20/")
    os.kill(workers(process)[1], signal.SIGKILL)
    train_factory.wait_for(process, "resuming at step")
    train_factory.wait_for(process, "step 40/")
    process.kill()


def test_restarts_that_would_meet_at_the_addresses_of_the_dead_are_refused(tmp_path):
    asked = {"TORCHELASTIC_MAX_RESTARTS": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    done = train_factory.run("pipeline.train", str(write_config(tmp_path)), **asked)
    assert done.returncode == 2
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run's folder: checkpoints of steps 18 and 24."""
    folder = tmp_path_factory.mktemp("finished")
    train(write_config(folder))
    return folder


def test_a_run_holds_its_config_its_code_and_its_environment(finished):
    run = finished / "run"
    assert "latent_channels: 4" in (run / "config.yaml").read_text()  # as resolved
    assert "torch==" in (run / "environment.txt").read_text()
    assert (run / "git.txt").is_file()
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == ["latest", "step_00000018", "step_00000024"]  # the two to keep
    for tag in ("loss/train", "optimizer/grad_norm", "speed/data_wait_fraction"):
        assert len(scalars(run, tag)) == 24
    assert len(scalars(run, "loss_by_noise_level/loss_t_0.5625")) > 5


def plan_of(folder: Path, *overrides: str):
    return fit_run(load_config(TrainConfig, write_config(folder), list(overrides)))


def test_another_config_over_a_run_is_refused_with_the_difference(finished):
    with pytest.raises(InputError, match=r"optimizer\.lr: saved 0\.001, given 0\.002"):
        check_run(plan_of(finished, "optimizer.lr=2e-3"), override=False)
    check_run(plan_of(finished, "engine.timeout_s=61"), override=False)  # changes no result
    check_run(plan_of(finished), override=False)


def test_what_stopped_before_its_first_checkpoint_may_become_another_run(tmp_path):
    config = write_config(tmp_path)
    kill(tmp_path, config, "step 2/", 1, "checkpoint.every_steps=24")
    run = tmp_path / "run"
    assert (run / "config.yaml").is_file()
    assert list((run / "eras").glob("epoch_*.json"))
    kind = Kind(encoders={"mini": (5, 8)}, channels=4)
    make_dataset(tmp_path / "other", [((32, 32), 20)], kind)
    output = train(config, f"data.path={tmp_path / 'other'}", "optimizer.lr=2e-3")
    assert "20 pictures per epoch" in output
    (entry,) = (json.loads(path.read_text()) for path in (run / "eras").glob("epoch_*.json"))
    other = fit_run(load_run_config(run)).loader.first.mixture
    assert entry["datasets"] == other.identities()


WSD = ["optimizer.schedule=warmup_stable_decay", "optimizer.decay_images=48"]
CONSTANT = ["optimizer.schedule=constant_with_warmup"]
MORE = ["training.images=288"]


@pytest.mark.parametrize(
    ("begun", "given", "step"),
    [
        (CONSTANT, [*CONSTANT, *MORE], None),
        (CONSTANT, [*CONSTANT, "training.images=96"], None),
        (CONSTANT, [*WSD, *MORE], None),
        (CONSTANT, WSD, 19),
        (CONSTANT, [*CONSTANT, "optimizer.warmup_images=48"], 0),
        ([*WSD, *MORE], [*WSD, "training.images=384"], None),
        ([*WSD, *MORE], CONSTANT, None),
        (WSD, [*WSD, *MORE], 19),
        ([], MORE, 4),
        ([], ["optimizer.schedule=linear"], 4),
    ],
)
def test_more_pictures_need_no_override_where_every_step_so_far_stays_as_it_was(
    finished, copy, begun, given, step
):
    place = f"run={copy}"
    (copy / "config.yaml").write_text(dump_config(plan_of(finished, place, *begun).config))
    check_run(plan_of(finished, place, *given), override=step is not None)
    if step is not None:
        why = f"By the new schedule step {step} would have had another learning rate"
        with pytest.raises(InputError, match=why):
            check_run(plan_of(finished, place, *given), override=False)


@pytest.mark.parametrize("change", ["hidden_size=128", "kind=uvit"])
def test_another_network_is_refused_in_words_even_with_override(finished, copy, change):
    more = ["training.images=208", f"model.{change}", f"run={copy}", "--override"]
    assert "is of another network" in train(finished / "run.yaml", *more, status=2)


def test_a_dataset_made_with_another_vae_is_refused_by_the_command(finished, tmp_path):
    from diffusers import AutoencoderKL

    AutoencoderKL(latent_channels=4).save_pretrained(tmp_path / "other")
    errors = train(finished / "run.yaml", f"encoders.vae={tmp_path / 'other'}", status=2)
    assert "is not the encoder that prepared the data" in errors


# --- checkpoints, damaged on purpose


def resume(copy: Path, status: int = 0) -> str:
    """Resume a copy of a run to which two more steps were given."""
    config = write_config(copy.parent, copy.name)
    return train(config, "training.images=208", "--override", status=status)


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "missing":
        return path.unlink()
    if how == "flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes({"truncated": data[:-1], "zeroed": bytes(len(data))}.get(how, data))


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    shutil.copytree(finished / "run", tmp_path / "copy")
    return tmp_path / "copy"


def check_newest(run: Path, name: str, damaged: str = "") -> None:
    found = newest_sound(run)
    assert found is not None
    assert found.name == name, damaged


@pytest.mark.parametrize("how", ["flipped", "truncated", "zeroed", "missing"])
def test_every_damage_to_every_file_of_a_checkpoint_is_found(copy, how):
    folder = copy / "checkpoints" / "step_00000024"
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert len(files) == 3
    for path in files:
        if path.name == "checkpoint.json" and how == "flipped":
            continue  # any bit of it may be one that says nothing, such as a space
        original = path.read_bytes()
        damage(path, how)
        check_newest(copy, "step_00000018", f"{path.name} {how}")
        path.write_bytes(original)
    check_newest(copy, "step_00000024")


def test_a_damaged_checkpoint_is_named_and_the_previous_one_resumed(copy):
    damage(copy / "checkpoints" / "step_00000024" / "rank_00000.safetensors", "flipped")
    output = resume(copy)
    for said in ("checkpoint passed over", "rank_00000.safetensors", "resuming at step 18 of 26"):
        assert said in output


def test_with_every_checkpoint_damaged_nothing_starts_from_zero(copy):
    for folder in (copy / "checkpoints").glob("step_*"):
        damage(folder / "rank_00000.safetensors", "truncated")
    assert "none of 2 checkpoints is whole" in resume(copy, status=2)


def test_a_checkpoint_of_the_format_before_is_refused_in_one_line(copy):
    for folder in (copy / "checkpoints").glob("step_*"):
        record = json.loads((folder / "checkpoint.json").read_text())
        del record["format"]
        (folder / "checkpoint.json").write_text(json.dumps(record))
    assert "got a checkpoint of format 1, expected 3" in resume(copy, status=2)


@pytest.mark.parametrize("form", ["path", "datasets.a.path"])
def test_a_run_goes_on_and_opens_from_any_folder_wherever_its_dataset_lies(
    tmp_path, monkeypatch, form
):
    here = tmp_path / "here"
    here.mkdir()
    text = write_config(here).read_text().replace(f"{here}/", "")
    if form != "path":
        text = text.replace("{path: dataset}", "{datasets: {a: {path: dataset}}}")
    (here / "run.yaml").write_text(text)
    done = train_factory.run("pipeline.train", "run.yaml", *WSD, "training.images=96", cwd=here)
    assert done.returncode == 0, done.stderr

    monkeypatch.chdir(tmp_path)
    run, more = here / "run", [*WSD, "training.images=96", "run=here/run"]

    def given(place: str, *others: str):
        overrides = [*more, f"data.{form}={place}", *others]
        return fit_run(load_config(TrainConfig, here / "run.yaml", overrides))

    for number, move in enumerate((os.rename, shutil.copytree, os.symlink)):
        place = tmp_path / f"moved_{number}"
        move(here / "dataset" if number == 0 else tmp_path / "moved_0", place)
        fitted = given(place.name)
        assert fitted.loader.era_at(0).mixture.datasets[0].source.path == str(place)
        check_run(given(place.name, "data.prefetch=0"), override=False)
        with pytest.raises(InputError, match=r"window_shards: saved 4, given 2"):
            check_run(given(place.name, "data.window_shards=2"), override=False)
    # Nothing of the dataset but the record of it is asked for.
    shutil.rmtree(tmp_path / "moved_0")
    trained = open_trained(run, "ema", None)
    assert trained.manifest.codec.channels == 4
    assert Path(
        trained.config.data.sources["a" if "datasets" in form else "data"].path
    ).is_absolute()

    # The same shape at the same place is not the same dataset.
    kind = Kind(encoders={"mini": (5, 8)}, channels=4)
    for name, change in (("id", {"id": "07her"}), ("generations", {"fingerprint": "5econd"})):
        other = make_dataset(tmp_path / name, [((32, 32), 90)], kind)
        manifest = read_manifest(other)
        if name == "generations":
            last = manifest.generations[-1].model_copy(update=change)
            change = {"generations": [last]}
        manifest = manifest.model_copy(update=change).with_fingerprint()
        (other / "manifest.json").write_text(manifest.model_dump_json())
        with pytest.raises(InputError, match=rf"is another dataset than the run's:\n  {name}: got"):
            given(name)
        with pytest.raises(InputError, match=rf"is another dataset than the run's:\n  {name}: got"):
            open_trained(run, "ema", None, [f"data.{form}={other}"])


@pytest.mark.parametrize("key", ["start_from.run", "model.init_from"])
def test_what_a_run_began_with_may_move_but_not_change(finished, copy, key):
    first, config = copy.parent / "first", finished / "run.yaml"
    place = f"run={copy}"
    was = fit_run(load_config(TrainConfig, config, [place, f"{key}={first}"])).config
    (copy / "config.yaml").write_text(dump_config(was))
    moved = fit_run(load_config(TrainConfig, config, [place, f"{key}={copy.parent / 'second'}"]))
    check_run(moved, override=False)
    first.mkdir()
    with pytest.raises(InputError, match=rf"{key}: saved"):
        check_run(moved, override=False)


def test_a_run_records_the_data_of_each_epoch_and_counts_what_it_skipped(tmp_path):
    config = write_config(tmp_path)
    shard = sorted((tmp_path / "dataset").glob("shards/32x32/*.tar"))[0]
    shard.write_bytes(bytes(shard.stat().st_size))
    options = ["data.grow=true", "data.on_corrupt=skip", "data.canonical_partitions=1"]
    done = train_factory.run("pipeline.train", str(config), *options)
    assert done.returncode == 0, done.stderr
    epochs = sorted(p.name for p in (tmp_path / "run" / "eras").glob("epoch_*.json"))
    assert epochs[:2] == ["epoch_00000000.json", "epoch_00000001.json"]
    assert scalars(tmp_path / "run", "data/skipped_samples")[-1][1] > 0
    assert shard.name in done.stderr + done.stdout


# In a process of its own: what the trainer's step tells the network, and what the step was of.
RECORD = """
import sys
from pathlib import Path
import torch
from data_prep.schema import read_manifest
from models.command import load_config
from models.dit import DiT
from pipeline.data.batch import Batch
from pipeline.config import TrainConfig, dump_config, load_run_config
from pipeline.loop import train_all

told, batches = [], []
forward, split = DiT.forward, Batch.split
DiT.forward = lambda self, *given: told.append([None if c is None else c.clone() for c in given[2]]) or forward(self, *given)
Batch.split = lambda self, size: batches.append((self.step, self.indices.clone(), [c if c is None else c.clone() for c in self.conditions])) or split(self, size)
train_all([load_config(TrainConfig, Path(sys.argv[1]), sys.argv[3:])])
torch.save((told, batches), sys.argv[2])
"""


def test_the_network_is_told_neither_caption_nor_class_of_the_samples_that_a_step_drops(tmp_path):
    kind = Kind(encoders={"mini": (5, 8)}, channels=4, label=True)
    make_dataset(tmp_path / "dataset", [((32, 32), 40)], kind)
    options = ["training.images=48", "training.caption_dropout=0.4", "model.num_classes=10"]
    recorded = tmp_path / "told.pt"
    config = str(write_config(tmp_path))
    done = train_factory.run("-c", RECORD, config, str(recorded), *options)
    assert done.returncode == 0, done.stderr
    told, batches = torch.load(recorded)
    assert len(told) == len(batches) == 6
    for now, (step, places, before) in zip(told, batches, strict=True):
        dropped = draw_dropout(3, step, 8, 0.4)[places]
        for condition, given in zip(now, before, strict=True):
            assert condition is given is None or torch.equal(condition[~dropped], given[~dropped])
        text, mask, pooled, _, label, _ = now
        # The empty caption is two tokens of 0.5, its pooled vector 0.25; ten classes are 0 to 9.
        rows = (torch.arange(text.shape[1]) < 2).expand(int(dropped.sum()), -1)
        assert torch.equal(mask[dropped], rows)
        assert torch.equal(text[dropped], 0.5 * rows[..., None].expand(-1, -1, 8).half())
        assert (pooled[dropped] == 0.25).all()
        assert (label[dropped] == 10).all()
