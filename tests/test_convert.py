"""Weights of another objective carried over: the network computes in its own terms and answers in the run's."""

import math
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from models.config import InputError, parse_config
from models.networks import DiTConfig, build_model
from pipeline.config import TrainConfig, load_run_config
from pipeline.data.randomness import draw_noise
from pipeline.inference.exported import make_scheduler, save_network, save_single
from pipeline.inference.heldout import x0_errors
from pipeline.objectives.config import ObjectiveConfig, Task
from pipeline.objectives.objective import Objective, prediction_coefficients
from pipeline.objectives.paths import NoisePath, VPDiscrete, vp_signal
from pipeline.runs.setup import fit_run
from pipeline.runs.start import in_its_terms
from pipeline.runs.trained import open_trained
from tests import train_factory
from tests.test_objective import COMBINATIONS, PATHS, implied, make

CPU = torch.device("cpu")


def converted(old: tuple[str, str], new: tuple[str, str]) -> Objective:
    """The objective `new` of a network that computes `old`."""
    return make(*new, network={"path": PATHS[old[0]], "prediction": old[1]})


def level_of(path: NoisePath, ratio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """t of a path at which sigma/alpha has this value, and alpha there, in fp64: by its table, or by bisection."""
    if isinstance(path, VPDiscrete):
        alpha = vp_signal(path.betas, path.zero_terminal_snr)
        levels = np.log(np.sqrt(1 - alpha**2) / np.maximum(alpha, 1e-6))
        t = np.interp(np.log(ratio), levels, np.arange(1000.0)) / 1000
        return t, 1 / np.hypot(1, ratio)
    low, high = np.zeros_like(ratio), np.ones_like(ratio)
    for _ in range(60):
        middle = (low + high) / 2
        alpha, sigma = (c.numpy() for c in path.alpha_sigma(torch.from_numpy(middle)))
        above = sigma > ratio * alpha
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return middle, alpha


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    model = build_model(DiTConfig(size="debug", latent_channels=4, text_dim=0, pooled_dim=0))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return model.eval().requires_grad_(False)


def recorded(network: Callable, seen: list[torch.Tensor]) -> Callable:
    """The network, with what it is given and answers put down in `seen`."""
    return lambda x, t, _: seen.extend([x, t, network(x, t)]) or seen[2]


@pytest.mark.parametrize("old", COMBINATIONS)
def test_a_converted_network_s_x0_is_the_original_s_at_every_level_that_both_paths_have(
    network, old
):
    for new in (c for c in COMBINATIONS if c != old):
        objective = converted(old, new)
        path, t = objective.config.own.path, torch.arange(0, 1000, 37) / 1000
        alpha, sigma = (c.double().numpy() for c in objective.alpha_sigma(t))
        (a_first, a_last), (s_first, s_last) = path.ends()
        held = (alpha * s_first <= sigma * a_first) & (sigma * a_last <= alpha * s_last)
        held &= sigma > 0
        t, ratio, power = t[held], (sigma / alpha.clip(1e-9))[held], np.hypot(alpha, sigma)[held]
        own_t, own_alpha = level_of(path, ratio)
        a, s, p = (torch.from_numpy(c) for c in (own_alpha, own_alpha * ratio, power))
        x_t = objective.add_noise(*(draw_noise(0, i, range(len(t)), (4, 8, 8)) for i in (0, 1)), t)
        x = x_t.double() * (torch.hypot(a, s) / p).view(-1, 1, 1, 1)
        pred = network(x.float(), torch.from_numpy(own_t).float()).double()
        c = prediction_coefficients(objective.config.own, a, s)
        before = x * c.x0_x.view(-1, 1, 1, 1) + pred * c.x0_p.view(-1, 1, 1, 1)
        answer = objective.called(recorded(network, seen := []), x_t, t, None)
        after, _ = implied(objective, answer, x_t, t)
        # Of the x0, or of latents (standard deviation 1) where the network's x0 is smaller.
        size = before.flatten(1).norm(dim=1).clamp_min(before[0].numel() ** 0.5)
        apart = (after - before).flatten(1).norm(dim=1) / size
        assert len(t) > 15
        assert apart[ratio <= 100].max() < 1e-5, new
        # Below SNR 1e-4, where x0 divides by alpha, the network's own output is compared.
        assert (seen[2] - pred).norm() / pred.norm() < 1e-5, new


@pytest.mark.parametrize("old", COMBINATIONS)
def test_a_network_in_bf16_gets_fp32_and_answers_finitely_at_every_t(network, old):
    for new in (c for c in COMBINATIONS if c != old):
        objective = converted(old, new)
        t = torch.from_numpy(objective.config.path.snap(np.linspace(0, 1, 101))).float()
        x_t = draw_noise(0, 0, range(101), (4, 2, 2)).bfloat16()
        half = recorded(lambda x, t: network(x, t).bfloat16(), seen := [])
        answer = objective.called(half, x_t, t, None)
        assert [x.dtype for x in (*seen[:2], answer)] == [torch.float32] * 3
        # From an x0 the noise comes by dividing by sigma; from a noise, x0 by dividing by alpha.
        most = math.inf if old[1] in ("sample", "epsilon") else 60
        assert answer.isfinite().all() and answer.abs().max() < most, new  # noqa: PT018


def test_the_share_of_t_that_the_old_path_lacks_is_that_of_its_ends():
    objective = converted(("sd", "epsilon"), ("rectified_flow", "flow"))
    alpha, sigma = objective.config.own.path.ends()
    first, last = sigma / (alpha + sigma)  # t 0.028 and 0.936
    lacking = objective.share_beyond(objective.draw_t(0, 0, 10_000, (4, 8, 8)))
    assert lacking == pytest.approx(first + 1 - last, abs=2e-4)
    back = converted(("rectified_flow", "flow"), ("sd", "epsilon"))
    assert back.share_beyond(back.draw_t(0, 0, 10_000, (4, 8, 8))) == 0


# --- runs

EPSILON = Task.model_validate({"path": "vp_discrete", "prediction": "epsilon"})
OPTIONS = ("optimizer.schedule=constant_with_warmup", "optimizer.warmup_images=0", "monitor.every_steps=50",
           "monitor.heldout_samples=16", "monitor.sample_every_steps=50", "checkpoint.every_steps=100")  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A dataset, and a DiT and a UNet that learned epsilon from it, in runs of their names."""
    folder = tmp_path_factory.mktemp("carried")
    for kind in ("dit", "unet"):
        config = train_factory.write_config(folder, kind, heldout=[((32, 32), 16)])
        options = ("objective.preset=sd15-epsilon", f"model.kind={kind}", "training.images=1600")
        train_factory.train(config, *options, *OPTIONS)
    return folder


def heldout(run: Any, objective: Objective) -> torch.Tensor:
    """Mean x0 error of a run's average weights at each of LOG_SNR, by an objective."""
    network, loader = (
        open_trained(run, "ema", None).network(CPU),
        fit_run(load_run_config(run)).loader,
    )
    batches = loader.heldout_batches(16)
    codec = loader.manifest.codec
    return torch.cat([x0_errors(network, objective, codec, b) for b in batches], 1).mean(1)


def logged(run: Any, weights: str = "ema") -> list[tuple[int, float]]:
    """The held-out x0 error at t 0.3125 by step; at noisier t that of epsilon, divided by alpha, is large by itself."""
    return train_factory.scalars(run, f"heldout_{weights}/x0_mse_t_0.3125")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "ranks", "stage"),
    [("dit", 2, 3), ("unet", 1, 1)],
)
def test_a_network_of_epsilon_goes_on_as_rectified_flow_from_its_own_error(
    home, kind, ranks, stage
):
    given, run, fresh = home / kind, home / f"{kind}_flow", home / f"{kind}_fresh"
    config, own = train_factory.write_config(home, run.name), [f"model.kind={kind}", *OPTIONS]
    options = [f"start_from.run={given}", "start_from.convert=true"]
    if kind == "unet":
        # As a stock pipeline has them: the UNet of diffusers' class, and the scheduler beside it.
        save_network(open_trained(given, "ema", None), home / "stock" / "unet", torch.float32)
        make_scheduler(EPSILON, None, (4, 4, 4)).save_pretrained(home / "stock" / "scheduler")
        options = [f"model.init_from={home / 'stock' / 'unet'}"]
        refused = train_factory.train(config, *own, *options, status=2)
        options += [f"objective.network={refused.split('objective.network=')[1].split(chr(39))[1]}"]
    options += ["training.images=1600", f"engine.zero_stage={stage}"]
    said = train_factory.train(config, *own, *options, ranks=ranks)
    assert said.count("of the t drawn have a noise level that its own path lacks") == 1
    objective = load_run_config(run).objective
    assert (objective.own, objective.prediction) == (EPSILON, "flow")
    # Of the same weights: a table's levels are half a step off those asked for, a tenth of sigma at the cleanest.
    before = heldout(given, Objective(load_run_config(given).objective))
    after = heldout(given, Objective(objective))
    torch.testing.assert_close(after[:-1], before[:-1], rtol=0.02, atol=0)
    torch.testing.assert_close(after, before, rtol=0.1, atol=0)
    train_factory.train(train_factory.write_config(home, fresh.name), *own, "training.images=8")
    (_, begun), *_, (_, ended) = logged(run)
    print(
        f"{kind}: untrained {logged(fresh)[0][1]:.4f}, carried over {begun:.4f}, then {ended:.4f}"
    )
    assert ended < begun < 0.8 * logged(fresh)[0][1]


@pytest.mark.distributed
def test_a_converted_run_resumes_goes_on_elsewhere_and_is_exported_as_it_is(home, tmp_path):
    shutil.copytree(home / "dit", tmp_path / "given")
    shutil.copytree(home / "dataset", tmp_path / "dataset")
    config, run = train_factory.write_config(tmp_path, "flow"), tmp_path / "flow"
    options = [f"start_from.run={tmp_path / 'given'}", "start_from.convert=true", *OPTIONS]
    train_factory.train(config, *options, "training.images=40")
    # Resuming asks the run itself, wherever its first weights are by now.
    shutil.rmtree(tmp_path / "given")
    assert "resuming at step 5" in train_factory.train(config, *options, "training.images=80")
    saved = load_run_config(run).model_dump(mode="json") | {"run": str(tmp_path / "new")}
    assert Task(**saved["objective"]["network"]) == EPSILON

    def of(objective: dict[str, Any], convert: bool = False) -> ObjectiveConfig:
        data = {"start_from": {"run": str(run), "convert": convert}, "objective": objective}
        return in_its_terms(parse_config(TrainConfig, saved | data, "test")).objective

    # A conversion of a conversion is one; back in its own terms a network needs none.
    assert of({}).network == of({"preset": "edm"}, convert=True).network == EPSILON
    assert of({"preset": "sd15-epsilon"}, convert=True).network is None
    with pytest.raises(InputError, match=r"learned prediction flow .* start_from\.convert=true"):
        of({"preset": "edm"})
    with pytest.raises(InputError, match="convert has no effect"):
        of({}, convert=True)
    with pytest.raises(InputError, match=r"computes prediction epsilon .*network is prediction v"):
        of({"network": {"path": "vp_discrete", "prediction": "v"}})

    file, again = tmp_path / "given.safetensors", train_factory.write_config(tmp_path, "again")
    save_single(open_trained(run, "ema", None), file, torch.float32)
    train_factory.train(again, f"model.init_from={file}", *OPTIONS, "training.images=8")
    # As it was exported it begins, and that is no longer what it was carried over as.
    (start, _), (end, last) = logged(run)[0], logged(run)[-1]
    assert (start, end) == (0, 10)
    assert logged(tmp_path / "again", "raw")[0] == (0, pytest.approx(last, rel=1e-5))
    assert last != pytest.approx(logged(run)[0][1], rel=1e-3)
