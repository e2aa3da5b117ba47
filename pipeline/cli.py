"""The `flowmill` command: each stage is the module of the same arguments, imported only when called."""

import difflib
import importlib.metadata
import os
import runpy
import sys
from pathlib import Path

# Stage -> module and what it does. Strings, so that the import arrows hold and help is instant.
STAGES = {
    "demo": (
        "pipeline.demo",
        "a real picture set prepared, trained, sampled: CPU, minutes, no hub",
    ),
    "doctor": ("pipeline.doctor", "what this machine or cluster has and lacks, with remedies"),
    "config": ("pipeline.show_config", "show|diff|schema: resolved, against another, for editors"),
    "plan": ("pipeline.plan", "before spending: memory, hours, disk, bandwidth of a config"),
    "prepare": ("data_prep.prepare", "sources -> shards; run it again to resume"),
    "fit-vae": ("data_prep.fit_vae", "a small autoencoder of your own kind of pictures"),
    "verify": ("data_prep.verify", "audit a prepared dataset: every hash, count, shape, NaN"),
    "data": ("pipeline.show_data", "what an epoch will be; the samples of a step as a picture"),
    "objective": ("pipeline.show_objective", "what an objective trains, drawn beside the presets"),
    "train": ("pipeline.train", "shards -> trained model; run it again to resume"),
    "compare": ("pipeline.compare", "variants at equal compute, paired over seeds, with intervals"),
    "ema": ("pipeline.make_ema", "an EMA of any width after training, from a run's snapshots"),
    "evaluate": ("pipeline.evaluate", "held-out error by noise level, FID, KID, CLIP score"),
    "export": ("pipeline.export", "a diffusers pipeline folder, and one safetensors file"),
    "sample": ("pipeline.sample", "checkpoint + prompts -> PNG"),
    "submit": ("cluster.submit", "prepare, train or evaluate as a Ray job or on Slurm"),
}


def module_of(stage: str, arguments: list[str]) -> str:
    """The stage's module; what a preparation will take is for data_prep to say."""
    if stage == "plan" and any(is_preparation(argument) for argument in arguments):
        return "data_prep.estimate"
    return STAGES[stage][0]


def is_preparation(path: str) -> bool:
    """Whether it is a preparation's YAML file; what cannot be read is left for the stage to refuse."""
    import yaml

    try:
        tree = yaml.safe_load(Path(path).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(tree, dict) and "vae" in tree


def main() -> None:
    """`flowmill STAGE ...` is `python -m MODULE ...`."""
    stage = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if stage in ("-h", "--help", "help"):
        print("usage: flowmill STAGE [arguments]; STAGE --help says which, and names its page\n")
        for name, (_, what) in STAGES.items():
            print(f"  {name:<10} {what}")
        print("\nFrom pictures to a model: README.md; without pictures: make demo")
        return
    if stage == "--version":
        print(f"flowmill {importlib.metadata.version('flowmill')}")
        return
    if stage not in STAGES:
        near = difflib.get_close_matches(stage, STAGES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(STAGES)}"
        print(f"error flowmill: no stage {stage!r}; {hint}", file=sys.stderr)
        sys.exit(2)
    os.environ["FLOWMILL_PROG"] = f"flowmill {stage}"
    sys.path.insert(0, os.getcwd())  # as python -m does
    del sys.argv[1]
    runpy.run_module(module_of(stage, sys.argv[1:]), run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
