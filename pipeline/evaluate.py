"""What a trained model is worth: `python -m pipeline.evaluate RUN --features inception=FILE.pt`.

Held-out error by noise level; FID, KID, precision, recall, CLIP score of drawn pictures. Under torchrun the ranks
share the work; run again, it goes on where it stopped. No figure is given without what it was measured with.
"""

from models.command import package_folder, run_command
from models.config import InputError
from pipeline.arguments import split_places, takes
from pipeline.config import load_run_config
from pipeline.evaluation.config import Options


@takes(Options)
def main(options: Options) -> None:
    """Measure a run's checkpoint or a pipeline. Without --features and --clip only the held-out error."""
    options.check()
    if options.networks:
        package_folder("torchmetrics")
    from pipeline import distributed
    from pipeline.evaluation import subjects
    from pipeline.evaluation.measure import evaluate, record, show, write_tensorboard
    from pipeline.runs.trained import open_trained

    target, (places, overrides) = options.target, split_places(options.overrides)
    is_pipeline = (target / "model_index.json").is_file()
    device = distributed.join(1800 if is_pipeline else load_run_config(target).engine.timeout_s)
    if is_pipeline:
        trained = None
        overrides = options.overrides or []
        subject = subjects.pipeline_subject(target, overrides, options.trust_remote_code, device)
    else:
        weights, step, guide = options.weights, options.step, options.guide
        trained = open_trained(target, weights, step, places, guide)
        subject = subjects.run_subject(trained, overrides, device)
    name, found = evaluate(subject, trained, options, device)
    if not found:
        raise InputError(f"{target}: nothing to measure. Remedy: --features, --clip or --heldout")
    if distributed.is_main():
        path = options.results / name / "measurements.json"
        new = record(path, found)
        if trained is not None:
            write_tensorboard(target, trained.step, new)
        show(found)
        distributed.say(f"wrote {path}")
    distributed.stop()


if __name__ == "__main__":
    run_command(main, "pipeline/README.md#what-it-is-worth")
