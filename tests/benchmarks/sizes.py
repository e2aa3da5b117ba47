"""Parameters and FLOPs of every size, counted by torch on the meta device: the table of models/README.md.

    python -m tests.benchmarks.sizes

For latents of 32x32x4 (256 pixels), 77 text tokens of 768 and pooled text of 768. FLOPs are two per multiply-add,
of one picture forward; training takes three times as many.
"""

from collections.abc import Iterator
from typing import Any, get_args

import torch
from torch.utils.flop_counter import FlopCounterMode

from models.conditions import example_conditions
from models.networks import MODELS, build_model, config_class

DATA: dict[str, Any] = {"latent_channels": 4, "text_dim": 768, "pooled_dim": 768}
XL: dict[str, Any] = {"size_conditioning": True, "latent_downscale": 8}


def count(config: Any) -> tuple[int, int]:
    """Parameters, and FLOPs of one picture forward."""
    with torch.device("meta"), torch.no_grad():
        model = build_model(config)
        given = example_conditions(config, 1, (32, 32), 77)
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 4, 32, 32), torch.zeros(1), given)
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops()


def rows() -> Iterator[str]:
    for kind in MODELS:
        for size in get_args(config_class(kind).model_fields["size"].annotation):
            options = XL if size == "sdxl" else {}
            parameters, flops = count(config_class(kind)(size=size, **DATA, **options))
            yield f"| {kind} | {size} | {parameters / 1e6:,.1f} M | {flops / 1e9:,.1f} G |"


if __name__ == "__main__":
    print("\n".join(rows()))
