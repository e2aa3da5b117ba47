"""What each parameter is to the optimizer: whose matrix it is, whether it decays, its share of the LR."""

from typing import NamedTuple

from torch import nn

# Conditioning inside blocks: embeddings of t and the like, not features of the picture.
MODULATION = ("norm1.linear", "norm1_context.linear", "time_emb_proj")


class Role(NamedTuple):
    """hidden: a 2-D matrix between features inside a block, what Muon is for (Jordan 2024, 2502.16982)."""

    hidden: bool
    decay: bool
    lr_scale: float


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """Role of each parameter by name; embeddings, modulation, vectors and the ends are not hidden."""
    embeddings = {
        id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()
    }
    tables = ("table", "registers")  # 2-D, but rows of vectors
    roles = {}
    for name, parameter in model.named_parameters():
        vectors = id(parameter) in embeddings or any(word in name for word in tables)
        matrix = parameter.ndim >= 2 and not vectors
        inside = "blocks." in name or "mid_block." in name
        hidden = (
            matrix and inside and parameter.ndim == 2 and not any(m in name for m in MODULATION)
        )
        roles[name] = Role(hidden, matrix, 1.0)
    return roles
