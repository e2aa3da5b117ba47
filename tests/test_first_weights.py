"""First weights: the same bits for a name whatever the layout, as spread as the constructors say."""

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn

from models.networks import build_model
from pipeline.config import ModelConfig
from pipeline.training.first_weights import build_drawn
from tests import ranks_first_weights
from tests.test_networks import I1
from tests.train_factory import results

SIZES = {"latent_channels": 4, "text_dim": 8, "pooled_dim": 8, "latent_downscale": 8}
NETWORKS = [
    {"kind": "dit", "modulation": "shared", "register_tokens": 2, "mup_base_width": 32},
    {"kind": "dit", "num_classes": 5, "qk_norm": True},
    {"kind": "mmdit", "learned_positions": True, "position_grid": 8, "qk_norm": True},
    {"kind": "uvit"},
    {"kind": "mmdit", **I1, "text_rope": True},
    {"kind": "unet", "size_conditioning": True},
]
CASES = [f"{stage}:{precision}" for stage in range(4) for precision in ("fp32", "bf16")]


def network(more: dict, seed: int | None = 0) -> nn.Module:
    config = TypeAdapter(ModelConfig).validate_python({"size": "debug", **more})
    return build_drawn(config.with_sizes(SIZES), seed)


@pytest.mark.parametrize("more", NETWORKS, ids=str)
def test_each_parameter_is_spread_as_its_constructor_would_have_it_and_unlike_all_others(more):
    ours = dict(network(more).named_parameters())
    config = TypeAdapter(ModelConfig).validate_python({"size": "debug", **more})
    theirs = dict(build_model(config.with_sizes(SIZES)).named_parameters())
    assert list(ours) == list(theirs)
    signs: list[tuple[float, ...]] = []
    for name, value in ours.items():
        reference = theirs[name].detach()
        assert value.requires_grad
        assert value.shape == reference.shape
        if reference.numel() < 2 or reference.std() == 0 or name == "position_table":
            assert torch.equal(value, reference), name
            continue
        # Of n draws, means differ by some std / sqrt(n), and their own std by half of it.
        std, few = float(reference.std()), reference.numel() ** -0.5
        assert abs(float(value.detach().mean() - reference.mean())) < 6 * std * few, name
        assert abs(float(value.detach().std()) / std - 1) < 4 * few, name
        # Of another scale, the same stream would have the same signs.
        signs.append(tuple(value.flatten()[:50].detach().sign().tolist()))
    whole = [s for s in signs if len(s) == 50]
    assert len(whole) == len(set(whole)) > 5


def test_a_parameter_depends_on_the_seed_and_its_name_alone():
    shallow, deep = (network({"kind": "dit", "depth": n}).state_dict() for n in (2, 3))
    assert shallow.keys() < deep.keys()
    assert all(torch.equal(value, deep[name]) for name, value in shallow.items())
    other = network({"kind": "dit", "depth": 2}, seed=1).state_dict()
    assert not torch.equal(other["proj_in.weight"], shallow["proj_in.weight"])


def test_without_a_seed_nothing_is_drawn():
    assert not any(value.any() for value in network(NETWORKS[2], None).state_dict().values())


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_layout_begins_with_the_same_weights_and_stage_3_holds_none_whole(ranks):
    cases = CASES + ["3:bf16:2"] * (ranks == 2)
    found = results("first", "tests.ranks_first_weights", *cases, ranks=ranks)
    assert [case for case, *_ in found] == cases
    count = sum(p.numel() for p in build_drawn(ranks_first_weights.MODEL, None).parameters())
    for case, kept, *wrong in found:
        assert wrong == ["0"], case
        # What a parameter of stage 3 keeps beside its piece is empty.
        assert int(kept) == (0 if case.startswith("3") else count), case
