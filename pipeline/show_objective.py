"""What an objective really does, drawn and tabled beside the presets: `flowmill objective CONFIG.yaml`."""

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
    from pipeline.objectives.profiles import draw, make_profile, print_table

    size = (latent_channels, *parse_size(latent_size, "--latent-size"))
    section = read_yaml(config, overrides or []).get("objective", {})
    chosen = parse_config(ObjectiveConfig, section, f"{config}: objective")
    profiles = [make_profile("this config", chosen, size)]
    for name in read_yaml(PRESETS, []):
        preset = parse_config(ObjectiveConfig, {"preset": name}, str(PRESETS))
        profiles.append(make_profile(name, preset, size))
    console = plain_console(110)
    print_table(profiles, console)
    for note in chosen.notes():
        console.print(f"note: {note}")
    if not dry_run:
        output.parent.mkdir(parents=True, exist_ok=True)
        draw(profiles).savefig(output)
        console.print(f"{output}: density of t, log SNR, weight and effective weight")


if __name__ == "__main__":
    run_command(main, "pipeline/objectives/README.md")
