"""Model FLOPs utilisation: the arithmetic per picture, and the peak of the device."""

import time
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.conditions import example_conditions
from models.networks import build_model
from pipeline.training.config import GPUS


class ModelFlops:
    """FLOPs of one picture, forward and backward, counted by torch on the meta device.

    Neither recomputation by gradient checkpointing nor the alignment's projection counts: they are
    not the model's work (PaLM 2204.02311, appendix B). A multiplication and an addition are two.
    """

    def __init__(self, config: Any):
        plain = {"gradient_checkpointing": False, "attention": "sdpa", "alignment": None}
        # The latents that are counted may be larger than the config's own.
        plain |= {"position_grid": 64}
        update = {key: value for key, value in plain.items() if hasattr(config, key)}
        self.config = config.model_copy(update=update)

    def picture(self, height: int, width: int, text_length: int) -> float:
        """FLOPs for latents of height x width and so many text tokens, padding included."""
        return float(_terms(height * width, text_length) @ self._coefficients)

    @cached_property
    def _coefficients(self) -> np.ndarray:
        """Coefficients of a polynomial of degree 2 in pixels and tokens, exact for our layers."""
        with torch.device("meta"):
            network = build_model(self.config)
        pairs = [(16, 0), (32, 0), (64, 0)]
        if self.config.text_dim:
            pairs = [(16, 16), (32, 16), (64, 16), (16, 48), (16, 96), (32, 48)]
        counts = [self._count(network, side, side, length) for side, length in pairs]
        terms = np.array([_terms(side**2, length) for side, length in pairs])
        return np.linalg.lstsq(terms, np.array(counts), rcond=None)[0]

    def _count(self, network: Any, height: int, width: int, text_length: int) -> float:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            conditions = example_conditions(self.config, 1, (height, width), text_length)
            x_t = torch.zeros(1, self.config.latent_channels, height, width)
            network(x_t, torch.zeros(1), conditions).sum().backward()
        return float(counter.get_total_flops())


def _terms(pixels: int, tokens: int) -> np.ndarray:
    n, m = pixels / 1024, tokens / 64
    return np.array([1.0, n, n * n, m, m * m, n * m])


def peak_flops(device: torch.device, precision: str) -> tuple[float, str]:
    """FLOP/s of one device, and the source: the table, or else a large product, timed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    if precision == "bf16":
        for part, (tflops, _) in GPUS.items():
            if part in name:
                return tflops * 1e12, f"{tflops:g} TFLOP/s, bf16 dense, data sheet of {part}"
    size = 8192 if device.type == "cuda" else 1024
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        product = a @ a
        # Reading an element waits for the product.
        product[0, 0].item()
        seconds.append(time.perf_counter() - begin)
    peak = 2 * size**3 / min(seconds)
    return peak, f"{peak / 1e12:.3g} TFLOP/s, measured here: {size} x {size} {precision} product"
