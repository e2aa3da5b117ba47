"""The role of each parameter for the optimizer: hidden matrix or not, whether it decays, its share of the lr."""

from typing import Any, NamedTuple

import torch
from torch import nn

from models.networks import build_model

# Conditioning inside blocks: embeddings of t and the like, not features of the picture.
MODULATION = ("norm1.linear", "norm1_context.linear", "time_emb_proj")


class Role(NamedTuple):
    hidden: bool
    """A 2-D matrix between features inside a block, what Muon is for (Jordan 2024, 2502.16982)."""
    decay: bool
    lr_scale: float
    """For Adam under muP (2203.03466, table 8): the base width's fan_in over this one, of matrices; else 1."""


def shape_of(parameter: Any) -> torch.Size:
    """A parameter's whole shape; at stage 3 DeepSpeed keeps the parameter empty between uses."""
    return getattr(parameter, "ds_shape", parameter.shape)


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """Role of each parameter by name; embeddings, modulation, vectors and both ends are not hidden."""
    modules = model.named_modules()
    embeddings = {f"{name}.weight" for name, m in modules if isinstance(m, nn.Embedding)}
    base: dict[str, nn.Parameter] = {}
    config: Any = model.config
    if getattr(config, "mup_base_width", None):
        with torch.device("meta"):
            base = dict(build_model(config.at_base_width()).named_parameters())
    roles = {}
    for name, parameter in model.named_parameters():
        # Tables and registers have two dimensions, but each row is a vector.
        vectors = name in embeddings or "table" in name or "registers" in name
        shape = shape_of(parameter)
        matrix = len(shape) >= 2 and not vectors
        features = ("blocks." in name or "mid_block." in name) and len(shape) == 2
        hidden = matrix and features and not any(part in name for part in MODULATION)
        lr_scale = base[name].shape[1] / shape[1] if base and matrix else 1.0
        roles[name] = Role(hidden, matrix, lr_scale)
    return roles
