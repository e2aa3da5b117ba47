"""Presets compared at equal steps by `flowmill compare`, with the default objective as the base, whatever the config's.

    python -m tests.benchmarks.objectives configs/demo_train.yaml data.path=DATASET --steps 600 [--seeds 3]

The measure, the x0 error of held-out samples at given noise levels, does not depend on path, prediction, weighting
or distribution of t. A pair of lines that differ in one option says what that option does.
"""

import sys
import tempfile
from pathlib import Path

import yaml

from models.command import run_command
from pipeline.compare import main

# Name -> the objective section. After the presets, what differs from one of them in one option.
VARIANTS = {
    "sd15-epsilon": "{preset: sd15-epsilon}",
    "sd2-v": "{preset: sd2-v}",
    "nai3-v-ztsnr": "{preset: nai3-v-ztsnr}",
    "min-snr-v": "{preset: min-snr-v}",
    "sd3-rf-logit-normal": "{preset: sd3-rf-logit-normal}",
    "flux-shift": "{preset: flux-shift}",
    "edm": "{preset: edm}",
    "sd15-epsilon+min_snr": "{preset: sd15-epsilon, weighting: min_snr}",
    "sd2-v+min_snr": "{preset: sd2-v, weighting: min_snr}",
    "min-snr-v-min_snr": "{preset: min-snr-v, weighting: none}",
    "sd3-logit_normal": "{preset: sd3-rf-logit-normal, timesteps: uniform}",
}

if __name__ == "__main__":
    # A preset is merged into a section that is there, so there must be none.
    bare = yaml.safe_load(Path(sys.argv[1]).read_text()) | {"objective": {}}
    file = tempfile.NamedTemporaryFile("w", suffix=".yaml")  # noqa: SIM115
    yaml.safe_dump(bare, file)
    file.flush()
    sys.argv[1] = file.name
    sys.argv += [f"--change={name}=objective={section}" for name, section in VARIANTS.items()]
    run_command(main)
