"""Levers on quality at equal steps, each against the demo's recipe at 0.4 M parameters, by `flowmill compare`.

    nice python -m tests.benchmarks.levers FOLDER            # all that is not done yet; OMP_NUM_THREADS=1 beside other work
    nice python -m tests.benchmarks.levers FOLDER --large    # the best of them at the 6.4 M parameters of the demo itself
    python -m tests.benchmarks.levers [--large]              # the table of what is recorded

The demo's 1,438 OpenMoji pictures as latents of 4 x 16 x 16, of which a patch is 4 x 4: 16 tokens per picture. 600
steps of 32, three seeds, AdamW at the demo's rate unless a name says otherwise; no other lever is tuned again. Every
run's figures are a file in the folder `levers` beside this one, with which nothing is trained again on the same pictures.

REPA's teacher is no DINOv2: it is a ViT of 0.9 M parameters, trained here on the very pictures of the train split and
on their captions' embeddings, by contrast.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from models.command import run_command
from models.config import InputError
from pipeline import compare, demo

HERE = Path(__file__).parent
RECORDS, SEEDS = HERE / "levers", 3
SHRUNK = ["model.size=debug", "model.depth=5", "model.hidden_size=56", "model.num_heads=2"]
# The demo's recipe as it was when they were measured, and on one core.
BASE = [
    "model.patch_size=4",
    "objective.prediction=flow",
    "optimizer.lr=2e-3",
    "engine.precision=fp32",
    "engine.cpu_threads=1",
    "checkpoint.keep=1",
    "monitor.heldout_samples=0",
    "monitor.mfu=false",
    "monitor.block_norms=false",
]
LR = 2e-3
WIDE = ["model.hidden_size=112", "model.num_heads=4"]
# In the order of promise: what is cut off is missed least.
LEVERS: dict[str, list[str]] = {
    "adamw-lr-x3": [f"optimizer.lr={3 * LR}"],
    "adamw-lr-third": [f"optimizer.lr={LR / 3}"],
    "muon": ["optimizer.kind=muon"],
    "muon-lr-x3": ["optimizer.kind=muon", f"optimizer.lr={3 * LR}"],
    "muon-lr-third": ["optimizer.kind=muon", f"optimizer.lr={LR / 3}"],
    # The demo's t is logit-normal about 0.5.
    "logit-normal-0": ["objective.timesteps.mean=0"],
    "uniform-t": ["objective.timesteps=uniform"],
    "shift-2": ["objective.shift={kind: constant, value: 2}"],
    "x-prediction": ["objective.prediction=sample", "objective.weighting=velocity"],
    "v-prediction": ["objective.prediction=v", "objective.weighting=velocity"],
    "min-snr": ["objective.weighting=min_snr"],
    "repa": ["model.alignment={block: 2, hidden_size: 256}"],
    "long-skips": ["model.long_skips=true"],
    "text-adapter": ["model.text_adapter=1"],
    "patch-2": ["model.patch_size=2"],
    "tread": ["model.routing={ratio: 0.5, start: 1, end: -1}"],
    "masking": ["model.masking={ratio: 0.5, mixer_depth: 2}", "model.depth=3"],
    "no-adaln": ["model.modulation=none"],
    "swiglu": ["model.swiglu=true"],
    "sandwich-norm": ["model.sandwich_norm=true"],
    "qk-norm": ["model.qk_norm=true"],
    "rope": ["model.rope=true"],
    "pseudo-huber": ["objective.loss=pseudo_huber"],
    "beta2-0.999": ["optimizer.betas=[0.9, 0.999]"],
    "weight-decay": ["optimizer.weight_decay=0.1"],
    # muP: does the best of the three rates above serve a network twice as wide?
    **{
        f"wide{mup}-lr-{name}": [*WIDE, f"optimizer.lr={lr}", *option]
        for mup, option in (("", []), ("-mup", ["model.mup_base_width=56"]))
        for name, lr in (("x1", LR), ("x3", 3 * LR), ("third", LR / 3))
    },
}
LARGE = ("v-prediction", "patch-2", "adamw-lr-x3")


def python(*words: str) -> None:
    if subprocess.run([sys.executable, "-m", *words]).returncode:
        raise typer.Exit(1)


def train_teacher(dataset: Path, folder: Path, steps: int = 300, batch: int = 96) -> None:
    """A ViT whose patches' mean is nearest to its own caption's embedding, both ways (CLIP 2103.00020, figure 3)."""
    import torch
    from torch.nn import functional as F
    from transformers import ViTConfig, ViTModel

    from data_prep.schema.recorded import open_codec
    from models.vision_encoder import IMAGENET_MEAN, IMAGENET_STD
    from pipeline.data.config import DataConfig
    from pipeline.data.loader import Loader

    torch.set_num_threads(1)
    torch.manual_seed(0)
    loader = Loader(DataConfig(path=str(dataset)), global_batch=batch, seed=0)
    codec = open_codec(loader.manifest.codec, None, torch.device("cpu"))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    pictures, texts = list[torch.Tensor](), list[torch.Tensor]()
    epoch = int(loader.first.order.samples_per_epoch) // batch
    for found in itertools.islice(loader.batches(), epoch):
        assert found.text_emb is not None
        assert found.text_mask is not None
        pictures.append((codec.decode_mean(found.moments).float() / 255 - mean) / std)
        texts.append((found.text_emb.float() * found.text_mask[..., None]).sum(1))
    loader.close()
    sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = ViTConfig(**sizes, intermediate_size=512, image_size=64, patch_size=16)
    vit = ViTModel(config, add_pooling_layer=False)
    project = torch.nn.Linear(128, texts[0].shape[1])
    weights = [*vit.parameters(), *project.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.05)
    seen, read = torch.cat(pictures), F.normalize(torch.cat(texts))
    for step in range(steps):
        rows = torch.randperm(len(seen))[:batch]
        told = F.normalize(project(vit(seen[rows]).last_hidden_state[:, 1:].mean(1)))
        likeness, own = 20 * told @ read[rows].T, torch.arange(batch)
        loss = (F.cross_entropy(likeness, own) + F.cross_entropy(likeness.T, own)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"teacher: step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    vit.save_pretrained(folder)


def make_data(folder: Path) -> Path:
    """The demo's dataset, and the teacher's features as a layer over it; what is there is left."""
    dataset, teacher, layer = (folder / name for name in ("dataset", "teacher", "features"))
    if not (dataset / "manifest.json").is_file():
        for _, words in demo.commands(folder)[:2]:
            python(*words)
    if not (teacher / "model.safetensors").is_file():
        train_teacher(dataset, teacher)
    if not (layer / "manifest.json").is_file():
        config = folder / "features.yaml"
        vision = f"vision_encoder: {{path: {teacher}, patch_pixels: 16}}"
        config.write_text(f"base: {dataset}\n{vision}\nray: {{num_actors: 1}}\noutput: {layer}\n")
        python("data_prep.prepare", str(config))
    return dataset


def show_records(records: Path, budget: str) -> None:
    """The table of all levers of which every seed is recorded."""
    from pipeline.evaluation.comparison import write

    files = {n: [records / f"{n}_{seed}.json" for seed in range(SEEDS)] for n in ("base", *LEVERS)}
    runs = {
        name: [json.loads(path.read_text())["figures"] for path in paths]
        for name, paths in files.items()
        if all(path.is_file() for path in paths)
    }
    if "base" not in runs or len(runs) < 2:
        raise InputError(f"{records}: has no lever and base of {SEEDS} seeds yet")
    output = Path("outputs/levers")
    write(runs, output, budget)
    print((output / "comparison.md").read_text())


def main(
    folder: Annotated[Path | None, typer.Argument(help="of all that is made")] = None,
    large: Annotated[bool, typer.Option("--large", help="at the demo's own size")] = False,
    jobs: Annotated[int, typer.Option(help="runs side by side, one thread each")] = 1,
) -> None:
    """Measure the levers, going on where it stopped; without a folder show what is recorded."""
    size, steps = ("6M", 900) if large else (".", 600)
    if folder is None:
        show_records(RECORDS / size, f"{steps} steps each, {SEEDS} seeds")
        return
    dataset = make_data(folder.absolute())
    levers = LEVERS | {"repa": [*LEVERS["repa"], f"data.layers.teacher={folder / 'features'}"]}
    words = [str(demo.HERE / "configs" / "demo_train.yaml"), f"data.path={dataset}", *BASE]
    # Earlier weights are what guidance may lead away from.
    words += ["checkpoint.every_steps=300", "checkpoint.keep=3"] if large else SHRUNK
    taken = LARGE if large else levers
    words += [f"--change={name}={change}" for name in taken for change in levers[name]]
    words += [f"--steps={steps}", f"--seeds={SEEDS}", "--evaluate=--heldout=80 --batch-size=80"]
    words += [f"--jobs={jobs}"]
    sys.argv[1:] = [*words, f"--output={folder / 'runs' / size}", f"--records={RECORDS / size}"]
    run_command(compare.main)


if __name__ == "__main__":
    run_command(main)
