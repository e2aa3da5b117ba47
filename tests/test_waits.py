"""The host waits for the GPU nowhere between a batch's arrival and the end of its last backward."""

from collections import Counter
from typing import Any

import pytest
import torch

from models.networks import MaskingConfig, build_model
from pipeline.config import TrainConfig
from pipeline.objectives.config import ObjectiveConfig
from pipeline.objectives.objective import Objective
from pipeline.runs.setup import fit_run
from pipeline.training.forward import Forward
from tests import train_factory
from tests.shard_factory import Kind, make_dataset
from tests.waits import Made, Waits

META = torch.device("meta")
MODELS: list[dict[str, Any]] = [
    {"kind": "dit", "size_conditioning": True, "num_classes": 10},
    {"kind": "dit", "masking": MaskingConfig(mixer_depth=1), "rope": True, "register_tokens": 2},
    {"kind": "mmdit", "learned_positions": True, "qk_norm": True},
    {"kind": "uvit"},
    {"kind": "unet", "size_conditioning": True},
]


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_forward_and_backward_read_nothing_back_and_copy_without_blocking(model, tmp_path):
    kind = Kind(encoders={"mini": (5, 8)}, channels=4, label=True)
    section = {
        "data": {"path": str(make_dataset(tmp_path / "data", [((64, 64), 12)], kind))},
        "model": {"size": "debug", **model},
        "training": {"images": 12, "global_batch": 4},
        "run": str(tmp_path / "run"),
    }
    run, objective = fit_run(TrainConfig.model_validate(section)), Objective(ObjectiveConfig())
    with META:
        network = build_model(run.config.model)
    forward = Forward(network, objective, run.loader, run.config.model, 0.5, META)
    waits = Waits()
    for step, batch in zip(range(2), run.loader.batches(), strict=False):
        waits.seen.clear()  # in the first, tables were made that are kept
        # Each would be read one by one where held-out samples' noise is drawn.
        assert batch.to(META).indices is batch.indices
        with waits, Made(waits.seen):
            for micro_batch in batch.split(2):
                forward(micro_batch, forward.draw(step, batch.latent_size), 0).total.backward()
    run.loader.close()
    assert waits.seen == Counter()


# What DeepSpeed or the optimizer reads after the last backward, once per step.
NORM = {"_local_scalar_dense utils.is_invalid_grad_norm": 1}
LISTED = {
    "0:fp32": {"_local_scalar_dense ema.step": 1},
    "1:fp32": NORM,
    "1:bf16": NORM,
    "2:bf16": NORM | {"_local_scalar_dense stage_1_and_2.has_overflow": 1},
}


@pytest.mark.distributed
def test_a_step_waits_after_its_last_backward_alone_and_only_for_what_is_listed(tmp_path):
    options = ["engine.micro_batch=4", "training.images=32"]
    options += ["optimizer.warmup_images=0", "monitor.every_steps=100"]
    config = str(train_factory.write_config(tmp_path))
    done = train_factory.run("tests.waits", config, *LISTED, "--", *options)
    assert done.returncode == 0, done.stderr
    lines = [
        line.split(maxsplit=5)[1:] for line in done.stdout.splitlines() if line[:6] == "waits "
    ]
    for case, expected in LISTED.items():
        for step in "23":  # the first also opens and allocates
            seen = {(part, what): int(n) for c, s, part, n, what in lines if (c, s) == (case, step)}
            assert seen == {("optimizer", what): n for what, n in expected.items()}, case
