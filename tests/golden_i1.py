"""Makes tests/golden_i1.safetensors: `python -m tests.golden_i1 GIT_DIR`, of a clone of github.com/zlab-princeton/i1.

Runs i1's own torch model (2606.11289) on drawn weights. The file holds inputs, outputs, the commit, and names and
shapes of all weights of the tiny network and of the published ones; the weights are drawn again where it is read.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

GOLDEN = Path(__file__).with_suffix(".safetensors")
SOURCE = "torch_train/models/dit.py"
SHAPE = {"hidden_size": 32, "depth": 5, "num_heads": 2, "patch_size": 2, "in_channels": 4}
TINY = SHAPE | {"input_size": 8, "text_embed_dim": 12, "text_num_tokens": 6}
PUBLISHED = {"1B": "DiT-XL", "3B": "DiT-XL_2016"}
LENGTHS = (6, 2, 4)
COMPUTED = ("pos_embed", "rope_embedder.")
Shapes = dict[str, list[int]]


def draw_weights(shapes: Shapes) -> dict[str, Tensor]:
    """Normal weights for every name, drawn in turn; those that i1 computes itself are left out."""
    generator = np.random.default_rng(0)
    drawn = {}
    for name, shape in shapes.items():
        if not name.startswith(COMPUTED):
            value = generator.standard_normal(shape, np.float32)
            drawn[name] = torch.from_numpy(value * (shape[-1] ** -0.5 if len(shape) > 1 else 0.5))
    return drawn


def import_i1(git_dir: str, folder: Path) -> Any:
    """i1's module, from the newest commit of its repository."""
    shown = ["git", "--git-dir", git_dir, "show", f"HEAD:{SOURCE}"]
    (folder / "i1_dit.py").write_bytes(
        subprocess.run(shown, check=True, capture_output=True).stdout
    )
    spec = importlib.util.spec_from_file_location("i1_dit", folder / "i1_dit.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["i1_dit"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shapes_of(model: torch.nn.Module) -> Shapes:
    return {name: list(value.shape) for name, value in model.state_dict().items()}


def main(git_dir: str) -> None:
    with TemporaryDirectory() as folder:
        i1 = import_i1(git_dir, Path(folder))
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(len(LENGTHS), 4, 8, 8, generator=generator)
    text = torch.randn(len(LENGTHS), max(LENGTHS), 12, generator=generator)
    given, t = {"x_t": x_t, "text": text}, torch.zeros(1)
    keys: dict[str, Shapes] = {}
    # At 512 pixels i1 counts positions in halves.
    for resolution in (256, 512):
        model = i1.i1DiT(i1.DualStreamDiTConfig(**TINY, image_resolution=resolution)).eval()
        keys["tiny"] = shapes_of(model)
        model.load_state_dict(draw_weights(keys["tiny"]), strict=False)
        with torch.no_grad():
            given[f"whole_{resolution}"] = model(x_t, t, text, torch.ones(text.shape[:2]))
            parts = [
                model(x_t[i : i + 1], t, text[i : i + 1, :length])
                for i, length in enumerate(LENGTHS)
            ]
            given[f"cut_{resolution}"] = torch.cat(parts)
    for name, size in PUBLISHED.items():
        config = i1.DualStreamDiTConfig(**i1.DualStreamDiT_models[size], input_size=32)
        with torch.device("meta"):
            keys[name] = shapes_of(i1.i1DiT(config))
    commit = subprocess.check_output(["git", "--git-dir", git_dir, "rev-parse", "HEAD"], text=True)
    about = {"source": "github.com/zlab-princeton/i1", "commit": commit.strip()}
    given = {name: value.contiguous() for name, value in given.items()}
    save_file(given, GOLDEN, about | {"keys": json.dumps(keys)})


if __name__ == "__main__":
    main(sys.argv[1])
