"""Backends of attention: what runs, what it falls back to, that masks mean the same in each."""

import itertools
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from models import layers
from tests.test_networks import debug, inputs, predict, randomise
from tests.waits import Waits


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
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
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


class Varlen(torch.autograd.Function):
    """flash_attn_varlen_func in words: like its kernels, it leaves gradients of keys that no text has undefined."""

    @staticmethod
    def forward(ctx, q, k, v, ends_q, ends_k):
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            texts = zip(
                *(itertools.pairwise(ends.tolist()) for ends in (ends_q, ends_k)), strict=True
            )
            q, k, v = (x[None] for x in leaves)
            parts = [
                layers.sdpa(q[:, a:b], k[:, c:d], v[:, c:d], None)[0] for (a, b), (c, d) in texts
            ]
            out = torch.cat(parts)
        ctx.inside, ctx.used = (out, leaves), int(ends_k[-1])
        return out.detach()

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride]
        out, leaves = ctx.inside
        for_q, *others = torch.autograd.grad(out, leaves, gradient)
        for other in others:
            other[ctx.used :] = float("nan")
        return for_q, *others, None, None


@pytest.fixture
def flash_attn(monkeypatch):
    """A package of that name, since its kernels need a GPU; on meta the shape counts alone."""

    def varlen(q, k, v, ends_q, ends_k, longest_q, longest_k):
        assert ends_q.dtype == ends_k.dtype == torch.int32
        return q + k.sum() + v.sum() if q.is_meta else Varlen.apply(q, k, v, ends_q, ends_k)

    package = SimpleNamespace(flash_attn_varlen_func=varlen, flash_attn_func=None)
    monkeypatch.setitem(sys.modules, "flash_attn", package)


def masked_inputs(device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """q, k, v and a mask that keeps some keys, all, and some with gaps."""
    g = torch.Generator().manual_seed(0)
    shapes = [(3, 7, 2, 8), (3, 5, 2, 8), (3, 5, 2, 8)]
    tensors = [torch.randn(shape, generator=g).to(device).requires_grad_() for shape in shapes]
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [1, 0, 1, 1, 0]]).bool()
    return *tensors, mask[:, None, None].to(device)


def test_flash_packs_what_the_mask_keeps_and_gives_the_rest_no_gradient(flash_attn):
    results = []
    for run in (layers.sdpa, layers.flash):
        q, k, v, mask = masked_inputs()
        out = run(q, k, v, mask)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # another order of summing


def test_xformers_takes_one_row_of_bias_for_each_picture(monkeypatch):
    """Its bias has room for every head, query and key; in memory there is one row, aligned to 8."""
    biases: list[torch.Tensor] = []

    def attend(q, k, v, attn_bias):
        biases.append(attn_bias)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(q, k, v, attn_mask=attn_bias).transpose(1, 2)

    ops = SimpleNamespace(memory_efficient_attention=attend)
    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    q, k, v, mask = masked_inputs()
    torch.testing.assert_close(layers.xformers(q, k, v, mask), layers.sdpa(q, k, v, mask))
    (bias,) = biases
    assert bias.shape == (3, 2, 7, 5)
    assert bias.stride() == (8, 0, 0, 1)
    assert bias.untyped_storage().nbytes() == 3 * 8 * 4


def test_flash_does_not_wait_for_the_mask(flash_attn):
    """Meta stands for the GPU: on it a boolean index, or anything else that needs values, is an error."""
    q, k, v, mask = masked_inputs("meta")
    with Waits() as waits:
        layers.flash(q, k, v, mask).sum().backward()
    assert waits.seen == Counter()
