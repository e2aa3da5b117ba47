"""Backends of attention: what runs, what it falls back to, that masks mean the same in each."""

import pytest
import torch

from models import layers
from tests.test_networks import debug, inputs, predict, randomise


def test_the_backend_that_the_config_names_is_the_one_that_runs(monkeypatch):
    """Each backend is wrapped, so that what really ran is counted, in every attention of the network."""
    calls: list[str] = []

    def counted(name: str, function: layers.AttentionFunction) -> layers.AttentionFunction:
        return lambda q, k, v, mask: (calls.append(name), function(q, k, v, mask))[1]

    for name in ("sdpa", "xformers"):
        monkeypatch.setitem(layers.ATTENTION, name, counted(name, layers.sdpa))
    layers.attention_backend.cache_clear()
    for kind, attentions in (("dit", 4), ("mmdit", 2), ("uvit", 3)):
        for name in ("sdpa", "xformers"):
            calls.clear()
            model = randomise(debug(kind, attention=name))
            layers.attention_backend(name, "cpu", torch.float32)  # the probe
            calls.clear()
            predict(model, **inputs())
            assert calls == [name] * attentions
    layers.attention_backend.cache_clear()


@pytest.mark.parametrize("name", ["xformers", "flash"])
def test_a_backend_that_does_not_run_here_falls_back_with_one_line(name):
    layers.attention_backend.cache_clear()
    if torch.cuda.is_available():
        pytest.skip("it may run here")
    with pytest.warns(UserWarning, match=f"attention backend {name}: .*using sdpa") as lines:
        runs = [layers.attention_backend(name, "cpu", torch.float32) for _ in range(2)]
    assert runs == [layers.sdpa] * 2
    assert len([line for line in lines if "attention backend" in str(line.message)]) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["xformers", "flash"])
@pytest.mark.parametrize("masked", [False, True])
def test_backends_agree_with_sdpa(name, masked):
    q = torch.randn(2, 33, 4, 64, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(2, 21, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    mask = (torch.arange(21, device="cuda") < torch.tensor([[9], [21]], device="cuda"))[
        :, None, None
    ]
    run = layers.attention_backend(name, "cuda", torch.bfloat16)
    if run is layers.sdpa:
        pytest.skip(f"{name} does not run here")
    expected = layers.sdpa(q, k, v, mask if masked else None)
    out = run(q, k, v, mask if masked else None)
    torch.testing.assert_close(out, expected, rtol=0, atol=2e-2)  # bf16 rounding
