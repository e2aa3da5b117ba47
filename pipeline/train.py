"""Train a model on prepared shards: `python -m pipeline.train CONFIG.yaml [section.key=value ...]`.

Run the same command again to resume; on several GPUs `torchrun --nproc-per-node 8 -m pipeline.train ...`.
"""

from models.command import run_command
from pipeline.arguments import ConfigFile, DryRun, Override, Overrides


def main(
    config: ConfigFile,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    override: Override = False,
) -> None:
    """Train a model on a prepared dataset; run again to resume."""
    from pipeline import distributed
    from pipeline.loop import train_all
    from pipeline.runs.setup import check_run, describe, fit_run
    from pipeline.runs.start import load_stages

    stages = load_stages(config, overrides or [])
    if dry_run:
        for run in map(fit_run, stages):
            check_run(run, override)
            distributed.say(describe(run))
    else:
        train_all(stages, override)


if __name__ == "__main__":
    run_command(main, "pipeline/README.md")
