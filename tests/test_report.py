"""What people see of a preparation."""

import json
import shutil

import numpy as np
import pytest

from data_prep import report
from data_prep.config import PrepareConfig
from data_prep.preparation import prepare
from data_prep.schema import (
    REJECT_SCHEMA,
    REJECTS,
    latent_doubt,
    read_manifest,
)
from data_prep.shards import write_table
from data_prep.verify import verify
from models.command import load_config
from models.weights import Normalisation
from pipeline.config import TrainConfig
from pipeline.runs.planning import prepared_dataset
from pipeline.runs.setup import fit_run
from tests import train_factory
from tests.prep_factory import config_of_pictures


@pytest.mark.parametrize("scale", [0.05, 0.3, 0.49, 0.51, 1.0, 1.99, 2.01, 40.0])
@pytest.mark.parametrize("channels", [1, 4, 16])
def test_normalised_latents_far_from_std_1_are_said(scale, channels):
    rng = np.random.default_rng(channels)
    raw = rng.normal(0, rng.uniform(0.8, 1.2, channels), (100_000, channels)) + rng.normal(0, 0.1)
    shift, std = raw.mean(axis=0), raw.std(axis=0)
    whole = (raw - shift.mean()).std() / scale
    norm = Normalisation(mean=(float(shift.mean()),) * channels, std=(float(whole),) * channels)
    doubt = latent_doubt(shift.tolist(), std.tolist(), norm)
    assert bool(doubt) == (not 0.5 <= scale <= 2)
    if doubt:
        assert f"have a std of {scale:.3g}, " in doubt
        assert f"about {1 / (whole * scale):.4g}," in doubt


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_a_codec_that_does_not_fit_is_told_wherever_its_dataset_is_used(tmp_path, capsys, scale):
    codec = {"normalisation": {"mean": [0.0] * 4, "std": [scale] * 4}}
    path = train_factory.write_config(tmp_path, codec=codec)
    doubt = f"std of {1 / scale:g}, expected 0.5 to 2"
    write_table(tmp_path / "dataset" / REJECTS, REJECT_SCHEMA.empty_table())
    uses = {
        "prepare": lambda: report.print_result(
            tmp_path / "dataset", read_manifest(tmp_path / "dataset"), {}
        ),
        "verify": lambda: verify(tmp_path / "dataset"),
        "plan": lambda: print(*prepared_dataset(load_config(TrainConfig, path, [])).doubts),
        "train": lambda: fit_run(load_config(TrainConfig, path, [])),
    }
    for name, use in uses.items():
        use()
        shown = " ".join(capsys.readouterr().out.split())
        assert (doubt in shown) == (scale != 1), name
        assert shown.count("warning") == (scale != 1), name


@pytest.mark.parametrize(
    ("factor", "said"), [(0.7, False), (None, True), (0.0, True), ("none", True)]
)
def test_a_codec_without_a_scale_is_said_before_anything_is_made(
    tmp_path, vae_folder, text_folder, capsys, factor, said
):
    config = json.loads((vae_folder / "config.json").read_text()) | {"scaling_factor": factor}
    if factor == "none":
        del config["scaling_factor"]
    vae = shutil.copytree(vae_folder, tmp_path / "vae")
    (vae / "config.json").write_text(json.dumps(config))
    path = config_of_pictures(tmp_path, 2, vae, text_folder)
    prepare(load_config(PrepareConfig, path, []), dry_run=True)
    assert (f"{vae}/config.json has no scaling_factor" in capsys.readouterr().out) == said


def test_latents_that_are_all_alike_are_said():
    assert "std of 0," in latent_doubt([3.0], [0.0], Normalisation(mean=(0.0,), std=(1.0,)))
