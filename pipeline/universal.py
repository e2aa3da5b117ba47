"""Resuming on another number of ranks, at another ZeRO stage or in another precision.

DeepSpeed's converter (universal checkpointing, 2406.18820) makes one file a parameter and moment out of the
ranks' files; full weights and averages lie beside them anyway. Its own loader is not used: 0.19.8 cannot
go from stage 2 to 3, gives all groups the first one's weight decay at stage 3, and knows no averages.
"""

import os
import shutil
from argparse import Namespace
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from models.config import InputError
from pipeline import distributed
from pipeline.ema import WithEMA, masters

MOMENTS = ("exp_avg", "exp_avg_sq")  # what the converter carries

Read = Callable[[str, str], Tensor]  # (parameter, state) -> its full tensor


def partitions(engine: Any, optimizer: WithEMA) -> list[Tensor]:
    """The fp32 tensors whose states the optimizer keeps on this rank."""
    if engine.zero_optimization_stage() == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return [tensor for group in optimizer.param_groups for tensor in group["params"]]


def layout(engine: Any, optimizer: WithEMA) -> dict[str, Any]:
    """How the state is laid out over ranks, and what it is made of; for a checkpoint's record."""
    kept = [optimizer.state[tensor] for tensor in partitions(engine, optimizer)]
    found: dict[str, Any] = {
        "world_size": distributed.world_size(),
        "zero_stage": engine.zero_optimization_stage(),
        "precision": "bf16" if engine.bfloat16_enabled() else "fp32",
        "optimizer": type(optimizer).__name__,
        "optimizer_states": sorted({key for state in kept for key in state if key != "step"}),
        "optimizer_step": max((int(state.get("step", 0)) for state in kept), default=0),
    }
    if found["zero_stage"] == 0:  # DeepSpeed then numbers the parameters, in this order
        names = {parameter: name for name, parameter in engine.module.named_parameters()}
        found["parameters"] = [names[parameter] for parameter in masters(engine)]
    return found


def fits(record: dict[str, Any], engine: Any) -> bool:
    """Whether DeepSpeed can load the files as they are."""
    stage, bf16 = engine.zero_optimization_stage(), engine.bfloat16_enabled()
    same = (record["zero_stage"], record["precision"]) == (stage, "bf16" if bf16 else "fp32")
    return same and (stage == 0 or record["world_size"] == distributed.world_size())


def load(folder: Path, files: str, record: dict[str, Any], engine: Any, optimizer: WithEMA) -> None:
    """Put a checkpoint's state into an engine of another layout; `files`: DeepSpeed's folder in it. Collective.

    Raises InputError where the optimizer keeps what cannot be cut anew.
    """
    states = record["optimizer_states"]
    lacking = [
        key
        for key in states
        if key not in MOMENTS and not (folder / f"{key}.safetensors").is_file()
    ]
    written = "{zero_stage}, {world_size} ranks, {precision}".format(**record)
    if lacking:
        raise InputError(
            f"{folder}: written at ZeRO stage {written} by an optimizer that keeps {', '.join(lacking)}, "
            "which only the same layout can load. Remedy: as many ranks, that stage and precision."
        )
    now = layout(engine, optimizer)
    distributed.say(
        f"converting {folder.name} from ZeRO stage {written} to stage {now['zero_stage']}, "
        f"{now['world_size']} ranks, {now['precision']}"
    )
    converted = folder.with_suffix(".universal")
    if record["zero_stage"] and distributed.is_main():
        _convert(folder / files, converted)
    distributed.barrier()
    _fill(engine, optimizer, record, _reader(folder, files, record, converted))
    distributed.barrier()
    if distributed.is_main():
        shutil.rmtree(converted, ignore_errors=True)


def _convert(source: Path, target: Path) -> None:
    """DeepSpeed's converter, without its worker processes (which fork) and its chatter."""
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(target, ignore_errors=True)
    options = {"input_folder": str(source), "output_folder": str(target), "strict": True}
    options |= {"num_extract_workers": 1, "num_merge_workers": 1}
    options |= {"keep_temp_folder": False, "inject_missing_state": True}
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        ds_to_universal.main(Namespace(**options))


def _reader(folder: Path, files: str, record: dict[str, Any], converted: Path) -> Read:
    """Full tensors from a checkpoint; files are mapped, so that a rank reads what it takes."""
    full = {
        key: safe_open(folder / f"{name}.safetensors", "pt")
        for key, name in [("fp32", "raw"), *((k, k) for k in record["optimizer_states"])]
        if key not in MOMENTS
    }
    numbered: dict[str, Any] = {}
    if record["zero_stage"] == 0:
        path = folder / files / "mp_rank_00_model_states.pt"
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=False)["optimizer"]
        saved = saved.get("optimizer_state_dict", saved)["state"]
        numbered = {name: saved[number] for number, name in enumerate(record["parameters"])}

    def read(name: str, key: str) -> Tensor:
        if key in full:
            return full[key].get_tensor(name)
        if numbered:
            return numbered[name][key]
        path = converted / "zero" / name / f"{key}.pt"
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
        return saved["param"] if isinstance(saved, dict) else saved

    return read


@torch.no_grad()
def _fill(engine: Any, optimizer: WithEMA, record: dict[str, Any], read: Read) -> None:
    states, zero = record["optimizer_states"], engine.optimizer
    stage = engine.zero_optimization_stage()
    for tensor in partitions(engine, optimizer):
        step = torch.tensor(float(record["optimizer_step"]), device=tensor.device)
        optimizer.state[tensor] = {key: torch.zeros_like(tensor) for key in states} | {"step": step}
    if stage == 3:
        zero.checkpoint_event_prologue()  # nothing stays gathered meanwhile
    elif stage:
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
    whole = masters(engine) if stage == 0 else {}
    for name, parameter in engine.module.named_parameters():
        for key in ("fp32", *states):
            value = read(name, key)
            if stage == 3:
                _put_local(parameter, value, key)
            elif stage:
                parameter.set_full_hp_param(value, None if key == "fp32" else key)
            else:
                master = whole[parameter]
                mine = master if key == "fp32" else optimizer.state[master][key]
                mine.copy_(value.view_as(mine))
        if stage == 0:
            parameter.copy_(whole[parameter])
    if stage == 3:
        for number in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        zero.checkpoint_event_epilogue()
    elif stage:
        zero.update_lp_params()
    engine.global_steps, engine.skipped_steps = record["step"], 0


def _put_local(parameter: Any, value: Tensor, key: str) -> None:
    """This rank's part of a parameter at stage 3, the last one padded (DeepSpeed's setter cuts short there)."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    size = parameter.ds_tensor.numel()
    begin = min(size * distributed.rank(), value.numel())
    part = torch.zeros(size, dtype=torch.float32)
    mine = value.flatten()[begin : begin + size]
    part[: len(mine)] = mine
    if key == "fp32":
        safe_set_local_fp32_param(parameter, part)
    else:
        safe_set_local_optimizer_state(parameter, part, key)
