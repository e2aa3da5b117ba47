"""The objective report: its numbers against what is known of the presets, and its picture."""

import numpy as np
import pytest
from PIL import Image

from models.config import InputError, parse_config
from pipeline.objectives.config import ObjectiveConfig
from pipeline.objectives.profiles import LIMITS, PANELS, density, draw, make_curves, make_profile
from pipeline.show_objective import main


def profile(preset: str):
    config = parse_config(ObjectiveConfig, {"preset": preset}, "test")
    return make_profile(preset, config, (32, 32))


def test_v_and_edm_spend_the_loss_where_they_spend_the_samples():
    # Their target has variance 1 at every noise level for white latents, which the ideal denoiser attains.
    for name in ("sd2-v", "edm"):
        np.testing.assert_allclose(profile(name).ideal_loss, 1.0, rtol=1e-3)


def test_the_profile_of_a_preset_is_what_its_paper_says():
    nai = profile("nai3-v-ztsnr")
    assert np.isinf(nai.log_snr).mean() == pytest.approx(0.001, abs=2e-5)  # one level of 1000
    capped = nai.weight[np.isfinite(nai.log_snr)].max()
    assert capped == pytest.approx(5.0, rel=1e-3)  # gamma, on the x0 loss
    epsilon = profile("sd15-epsilon")
    np.testing.assert_allclose(epsilon.weight, np.exp(epsilon.log_snr), rtol=1e-3)
    assert epsilon.log_snr.min() == pytest.approx(np.log(0.0047), abs=0.02)
    assert np.median(profile("sd3-rf-logit-normal").log_snr) == pytest.approx(0, abs=1e-3)
    # Shift e^0.5 at 16 x 16 tokens takes 2 x 0.5 off the log SNR.
    assert np.median(profile("flux-shift").log_snr) == pytest.approx(-1, abs=1e-3)


@pytest.mark.parametrize("preset", ["sd3-rf-logit-normal", "sd15-epsilon"])
def test_drawn_densities_integrate_to_one(preset):
    p = profile(preset)
    edges = np.linspace(0, 1, 81)
    assert (density(p.t, edges) / 80).sum() == pytest.approx(1, abs=2e-3)
    edges = np.linspace(*LIMITS, 161)
    assert (density(p.log_snr, edges) / 8).sum() == pytest.approx(1, abs=2e-3)


def test_drawn_weights_are_those_of_flow_and_the_effective_one_is_1_at_snr_1():
    *_, (x, weight), (_, effective) = make_curves(profile("sd3-rf-logit-normal"))
    assert np.interp(0.0, x, effective) == pytest.approx(1.0)
    snr = np.exp(x)
    seen = np.isfinite(weight)
    np.testing.assert_allclose(
        weight[seen], (1 + np.sqrt(snr[seen])) ** 2, rtol=0.05
    )  # between draws


def test_the_command_prints_the_table_and_draws_the_picture(tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("objective: {preset: sd15-epsilon}\nseed: 1\n")
    main(config, ["objective.weighting=min_snr"], tmp_path / "o.png", "32x32", False)
    printed = capsys.readouterr().out
    for name in ("this config", "nai3-v-ztsnr", "flux-shift", "edm"):
        assert name in printed
    picture = np.asarray(Image.open(tmp_path / "o.png"))
    assert picture.shape == (700, 1120, 4)
    assert (picture[:, :, :3] < 40).all(-1).sum() > 2000  # the configured one, thick and dark


def test_each_panel_has_every_objective_s_curve_and_the_legend_names_them():
    profiles = [profile(name) for name in ("edm", "sd2-v", "nai3-v-ztsnr")]
    figure = draw(profiles)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["edm", "sd2-v", "nai3-v-ztsnr"]
    panels = zip(*map(make_curves, profiles), strict=True)
    for axes, (title, *_, scale), curves in zip(figure.axes, PANELS, panels, strict=True):
        assert (axes.get_title(loc="left"), axes.get_yscale()) == (title, scale)
        assert [line.get_label() for line in axes.lines] == names
        assert len({line.get_color() for line in axes.lines}) == 3
        for line, (x, y) in zip(axes.lines, curves, strict=True):
            np.testing.assert_array_equal(line.get_xydata(), np.stack([x, y], 1))


def test_a_wrong_config_or_size_ends_with_one_message(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("objective: {prediction: epsilon}\n")
    for path, overrides, size, message in (
        (config, [], "32x32", "objective: config: prediction epsilon on a path that ends at SNR 0"),
        (tmp_path / "no.yaml", [], "32x32", "no such config file"),
        (config, ["objective.prediction=v"], "32", "expected HEIGHTxWIDTH"),
    ):
        with pytest.raises(InputError, match=message):
            main(path, overrides, tmp_path / "o.png", size, False)
    assert not (tmp_path / "o.png").exists()
