"""Blocks compile whole, in every size, at every shape of pictures and texts that a run meets."""

from typing import get_args

import pytest
import yaml

from models.layers import RECOMPILE_LIMIT
from models.networks import MODELS, config_class
from tests.train_factory import ROOT, run

# In a process of its own: the checks of shapes that pytest wraps around functions are no graph.
# Dynamo alone decides what is a graph, so weights are on meta and nothing is generated.
MEET_SHAPES = """
import sys
import torch, yaml
from data_prep.images import ImagesConfig, list_buckets
from models.conditions import example_conditions
from models.layers import compile_blocks
from models.networks import build_model, config_class

model, resolution, lengths, most, downscale = yaml.safe_load(sys.argv[1])
config = config_class(model["kind"]).model_validate(model)
with torch.device("meta"):
    network = build_model(config)
compile_blocks(network, backend="eager")
buckets = list_buckets(ImagesConfig(resolution=resolution))[:most]
for number, (height, width) in enumerate(buckets):
    for length in lengths if number < 3 else lengths[:1]:
        with torch.device("meta"):
            size = height // downscale, width // downscale
            x_t, t = torch.zeros(4, config.latent_channels, *size), torch.zeros(4)
            conditions = example_conditions(config, 4, size, length)
        for masked in (True, False):
            mask = conditions.text_mask if masked else None
            out = network(x_t, t, conditions._replace(text_mask=mask))
            (out[0] if isinstance(out, tuple) else out).sum().backward()
print("graphs", torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""
DATA = {"latent_channels": 4, "text_dim": 12, "pooled_dim": 6, "num_classes": 3}
LENGTHS = [77, 16, 48, 80, 333]


def meets(
    model: dict, resolution: int, lengths: list[int], most: int = 100, downscale: int = 8
) -> None:
    case = yaml.safe_dump([model, resolution, lengths, most, downscale])
    done = run("-c", MEET_SHAPES, case)
    print(model, done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 0 < int(done.stdout.split()[-1]) < RECOMPILE_LIMIT


def sizes() -> list[tuple[str, str]]:
    return [
        (kind, size)
        for kind in MODELS
        for size in get_args(config_class(kind).model_fields["size"].annotation)
    ]


def test_blocks_of_several_sorts_compile_whole_at_many_shapes():
    """More graphs of one block's code than Dynamo allows unasked, which is fatal."""
    options = {"kind": "mmdit", "size": "debug", "dual_attention_layers": 1}
    meets({**DATA, **options, "qk_norm": True}, 256, [77, 16], most=2)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size"), sizes())
def test_every_size_compiles_whole_at_every_shape(kind, size):
    model = {**DATA, "kind": kind, "size": size}
    if kind == "mmdit":
        model |= {"qk_norm": True, "dual_attention_layers": 2}
    if size == "sdxl":
        model |= {"size_conditioning": True, "latent_downscale": 8}
    meets(model, 512, LENGTHS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("train_*.yaml")), ids=lambda p: p.stem
)
def test_every_shipped_config_compiles_whole_at_every_shape(path):
    model = DATA | yaml.safe_load(path.read_text())["model"]
    if model.get("modulation") == "none":
        # It is told no class, and its codec's latents are half the size of those here.
        model |= {"num_classes": 0, "position_grid": 64}
    resolution = 1024 if "1024" in path.stem else 512 if "512" in path.stem else 256
    meets(model, resolution, LENGTHS, downscale=1 if "pixels" in path.stem else 8)
