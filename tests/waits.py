"""Operations for which the host would wait for a GPU, seen by a dispatch mode; "meta" stands for the GPU.

Run as a module it trains a config once for each case, a stage and a precision, and prints those of each
step: python -m tests.waits CONFIG STAGE:PRECISION... -- OPTION...
"""

import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Their results' sizes or values are known to the host only once the GPU is there.
READS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique_consecutive",
    "_unique2",
    "equal",
}


class Waits(TorchDispatchMode):
    """Counts what waits, by the function of ours, or of DeepSpeed's, that asked for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        crosses = len({t.device.type for t in tensors}) > 1
        blocks = not (kwargs or {}).get("non_blocking", len(args) > 2 and args[2] is True)
        by_mask = name.startswith("index") and any(
            t.dtype in (torch.bool, torch.uint8)
            for t in tree_leaves(args[1:2])
            if isinstance(t, torch.Tensor)
        )
        copies = name in ("_to_copy", "copy_") and crosses and blocks
        if name in READS or by_mask or copies:
            self.seen[f"{name} {_asker()}"] += 1
        return out


class Made(TorchFunctionMode):
    """Counts tensors made from numbers on another device, which are copied there: no dispatch mode sees it."""

    def __init__(self, seen: Counter[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = torch.device(kwargs.get("device") or "cpu")
        if func in (torch.tensor, torch.as_tensor) and device.type != "cpu":
            self.seen[f"tensor {_asker()}"] += 1
        return func(*args, **kwargs)


def _asker() -> str:
    """The innermost function that asked and is neither torch's nor Python's."""
    for frame in reversed(traceback.extract_stack()):
        parts = Path(frame.filename).parts
        ours = "site-packages" not in parts and {"models", "pipeline"} & set(parts)
        if ours or "deepspeed" in parts:
            return f"{Path(frame.filename).stem}.{frame.name}"
    return "?"


def main() -> None:
    from deepspeed.accelerator import get_accelerator

    from models.command import load_config
    from pipeline import loop
    from pipeline.config import TrainConfig
    from pipeline.training import monitor

    waits, mark, parts = Waits(), monitor.Monitor.mark, Counter[tuple[str, str]]()

    def count(own: Any, part: str) -> None:
        """What has waited since the last mark belongs to the part that ends here."""
        for what, times in waits.seen.items():
            parts[part, what] += times
        waits.seen.clear()
        mark(own, part)

    patch.object(monitor.Monitor, "mark", count).start()
    # On a CPU it does nothing; on a GPU it waits for all.
    accelerator: Any = get_accelerator()
    accelerator.synchronize = lambda *_: waits.seen.update([f"synchronize {_asker()}"])
    cases, options = sys.argv[2 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    for case in cases:
        stage, precision = case.split(":")
        options += [
            f"engine.zero_stage={stage}",
            f"engine.precision={precision}",
            f"run={sys.argv[1]}.{case}",
        ]
        config = load_config(TrainConfig, Path(sys.argv[1]), options)
        with waits:
            for step in loop.steps(config):
                for (part, what), times in sorted(parts.items()):
                    print("waits", case, step, part, times, what, flush=True)
                parts.clear()


if __name__ == "__main__":
    main()
