"""What an objective really does, drawn and tabled beside the presets: `flowmill objective CONFIG.yaml`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from models.command import plain_console, read_yaml, run_command
from models.config import parse_config
from pipeline.arguments import parse_size
from pipeline.objectives.config import PRESETS, ObjectiveConfig


def main(
    config: Annotated[Path, typer.Argument(help="YAML file with an `objective` section")],
    overrides: Annotated[list[str] | None, typer.Argument(help="objective.key=value")] = None,
    output: Annotated[Path, typer.Option(help="the picture")] = Path("objective.png"),
    latent_size: Annotated[
        str, typer.Option(help="HEIGHTxWIDTH in latent pixels, for shifts")
    ] = "32x32",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="the table alone")] = False,
    latent_channels: Annotated[int, typer.Option(min=1, help="for a shift by dimension")] = 4,
) -> None:
    """Show what the configured objective trains, against the presets."""
    from pipeline.objectives.profiles import PANELS, draw, make_profile, print_table

    size = (latent_channels, *parse_size(latent_size, "--latent-size"))
    section = read_yaml(config, overrides or []).get("objective", {})
    chosen = parse_config(ObjectiveConfig, section, f"{config}: objective")
    objectives = {"this config": chosen}
    for name in read_yaml(PRESETS, []):
        objectives[name] = parse_config(ObjectiveConfig, {"preset": name}, str(PRESETS))
    profiles = [make_profile(name, each, size) for name, each in objectives.items()]
    console = plain_console(110)
    print_table(profiles, console)
    for note in chosen.notes():
        console.print(f"note: {note}")
    if not dry_run:
        output.parent.mkdir(parents=True, exist_ok=True)
        curves = {name: each.model_dump(mode="json") for name, each in objectives.items()}
        shown = {"curves": curves, "latent_size": size, "panels": PANELS}
        draw(profiles).savefig(output, metadata={"Description": json.dumps(shown)})
        console.print(f"{output}: density of t, log SNR, weight and effective weight")


if __name__ == "__main__":
    run_command(main, "pipeline/objectives/README.md")
