"""A network's first weights, parameter by parameter, so that no rank ever holds more than it keeps."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.networks import NetworkConfig, build_model
from pipeline import distributed
from pipeline.data.randomness import make_generator
from pipeline.training.config import EngineConfig
from pipeline.training.engine import deepspeed_config, micro_batch_size


class NoteFills(TorchDispatchMode):
    """Notes at each parameter what filled it last, which a meta tensor itself cannot tell."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(args[0], nn.Parameter) and func._schema.is_mutable:
            args[0].filled = func.overloadpacket.__name__, args[1:]  # pyright: ignore[reportAttributeAccessIssue]
        return func(*args, **(kwargs or {}))


def build_drawn(
    config: NetworkConfig,
    seed: int | None,
    place: Callable[[nn.Parameter], None] = lambda parameter: None,
) -> nn.Module:
    """The network, each parameter drawn from the seed and its name alone: the same bits on any rank and layout.

    They are drawn in fp32 on the CPU, and `place` is called with each before the next one is. Without a seed
    all are 0, for weights that a checkpoint holds.
    """
    with torch.device("meta"), NoteFills():
        model: nn.Module = build_model(config)
    for name, planned in dict[str, Any](model.named_parameters()).items():
        owner, _, attribute = name.rpartition(".")
        parameter = nn.Parameter(torch.zeros(planned.shape))
        if seed is not None:
            parameter.data = _drawn(planned, make_generator(seed, f"first weights/{name}"))
        setattr(model.get_submodule(owner), attribute, parameter)
        place(parameter)
    return model


def _drawn(planned: Any, generator: np.random.Generator) -> Tensor:
    (how, args), shape = planned.filled, tuple(planned.shape)
    # The dispatcher leaves out what is by default.
    low, high = mean, std = (*args, *(0.0, 1.0)[len(args) :])[:2]
    if how == "uniform_":
        return torch.from_numpy(generator.random(shape, np.float32)).mul_(high - low).add_(low)
    if how == "normal_":
        return torch.from_numpy(generator.standard_normal(shape, np.float32)).mul_(std).add_(mean)
    assert how in ("zero_", "fill_", "copy_"), how
    return getattr(torch.zeros(shape), how)(*args)


def placement(engine: EngineConfig, global_batch: int) -> Callable[[nn.Parameter], None]:
    """What moves a parameter to this rank's device in training's dtype; at stage 3 its piece alone. Collective there."""
    dtype = torch.bfloat16 if engine.precision == "bf16" else torch.float32
    cutter: Any = None
    if engine.zero_stage == 3:
        import deepspeed

        settings = deepspeed_config(engine, micro_batch_size(engine, global_batch), global_batch)
        # It cuts all of a module; one without parameters makes it ready for those that follow.
        cutter = deepspeed.zero.Init(nn.Module(), config_dict_or_path=settings)

    def place(parameter: nn.Parameter) -> None:
        parameter.data = parameter.data.to(distributed.own_device(), dtype)
        if cutter is not None:
            cutter._convert_to_zero_parameters([parameter])

    return place
