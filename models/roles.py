"""What each parameter is to the optimizer: whose matrix it is, whether it decays, its share of the LR."""

from typing import Any, NamedTuple

import torch
from torch import nn

from models.networks import build_model

# Conditioning inside blocks: embeddings of t and the like, not features of the picture.
MODULATION = ("norm1.linear", "norm1_context.linear", "time_emb_proj")


class Role(NamedTuple):
    """hidden: a 2-D matrix between features inside a block, what Muon is for (Jordan 2024, 2502.16982).

    lr_scale: 1 / fan_in of matrices whose fan_in grows with the width, relative to the base width's, for
    Adam under muP (2203.03466, table 8); else 1.
    """

    hidden: bool
    decay: bool
    lr_scale: float


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """Role of each parameter by name; embeddings, modulation, vectors and the ends are not hidden."""
    embeddings = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    tables = ("table", "registers")  # 2-D, but rows of vectors
    base: dict[str, nn.Parameter] = {}
    config: Any = model.config
    if getattr(config, "mup_base_width", None):
        with torch.device("meta"):
            base = dict(build_model(config.at_base_width()).named_parameters())
    roles = {}
    for name, parameter in model.named_parameters():
        vectors = id(parameter) in embeddings or any(word in name for word in tables)
        matrix = parameter.ndim >= 2 and not vectors
        inside = "blocks." in name or "mid_block." in name
        hidden = (
            matrix and inside and parameter.ndim == 2 and not any(m in name for m in MODULATION)
        )
        lr_scale = base[name].shape[1] / parameter.shape[1] if base and matrix else 1.0
        roles[name] = Role(hidden, matrix, lr_scale)
    return roles
