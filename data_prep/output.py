"""The output folder: whose it is, and whether it may be written to."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_prep.config import LayerConfig, PrepareConfig
from data_prep.report import console
from data_prep.scan import (
    LISTING,
    LISTING_SCHEMA,
    Comparison,
    Intake,
    changed_content,
    compare,
    listing_sha256,
)
from data_prep.schema import AUDITED, MANIFEST, WORK, read_manifest
from data_prep.shards import read_table, sealed_commits, work_of, write_table, write_text
from data_prep.sources.classes import count_classes
from data_prep.storage import delete, find_files, is_remote, names_in, open_root, patient
from models.config import InputError, differences
from models.lock import Lock

OURS = (MANIFEST, *AUDITED, "shards", "captions", WORK)
LOCK = "lock.json"


class StoreLock(Lock):
    """A lock on an object store, which alone can tell whether the file was there before."""

    def read(self) -> str:
        return patient(self._path.read_text)

    def create(self, text: str) -> bool:
        path = self._path
        put = partial(path.fs.pipe_file, path.path, text.encode(), mode="create")
        try:
            patient(put)
        except FileExistsError:
            return False
        with suppress(FileExistsError):
            # Only now does a store that ignores the mode betray itself.
            patient(put)
            self._say(
                f"{self._where}: the store cannot tell whether another process writes there too"
            )
        return True

    def write(self, text: str) -> None:
        patient(self._path.fs.pipe_file, self._path.path, text.encode())


def lock_output(config: PrepareConfig | LayerConfig) -> Lock:
    """The lock of an output folder that may be written to; raises InputError where that may not be."""
    in_ray_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if in_ray_job and not (is_remote(config.output) or os.path.isabs(config.output)):
        raise InputError(
            f"output: got {config.output}, expected an absolute path: in a Ray job a relative one lies in "
            "Ray's copy of the working directory. Remedy: output=/shared/disk/..."
        )
    dataset = open_root(config.output, "output")
    for name, source in config.sources.items() if isinstance(config, PrepareConfig) else ():
        if f"{dataset}/".startswith(f"{open_root(source.path, 'path')}/"):
            raise InputError(
                f"output: {config.output} lies in sources.{name}.path {source.path}, whose files it would "
                "add to. Remedy: choose a folder beside it."
            )
    there = names_in(dataset)
    strangers = sorted(n for n in there if n not in OURS and not n.lstrip(".").startswith(LOCK))
    if strangers and not (dataset / WORK / "config.json").exists():
        raise InputError(
            f"output: {config.output} holds other files ({', '.join(strangers[:3])}), expected a folder "
            "that is new, empty, or of an earlier preparation."
        )
    kind = StoreLock if is_remote(dataset) else Lock
    return kind(dataset / LOCK, "output", console.print)


def open_output(
    config: PrepareConfig, settings: dict[str, Any], listing: pa.Table, restart: bool
) -> tuple[Path, Comparison]:
    """The output folder, and its generations beside the sources as they are; a new one's first is begun.

    Raises InputError where the output is of other settings.
    """
    dataset = open_root(config.output, "output")
    work = dataset / WORK
    if restart:
        # config.json, and with it the right to resume, goes first.
        for path in (work / "config.json", *(dataset / name for name in OURS)):
            if count := delete(path):
                console.print(f"deleted {path} ({count} files)")
    if facts := begun_facts(dataset):
        refuse_other_settings(config.output, facts[0]["settings"], settings)
    else:
        begin(config, dataset, settings, compare([], listing))
    return dataset, compare(read_intakes(dataset), listing)


def begun_facts(dataset: Path) -> list[dict[str, Any]]:
    """What work/config.json says of each generation that was begun: the file that begins one.

    The first one's has the settings too, with sources that were added since.
    """
    path = dataset / WORK / "config.json"
    if not path.exists():
        return []
    first = json.loads(path.read_text())
    return [first, *first.get("grown", [])]


def read_intakes(dataset: Path) -> list[Intake]:
    """Every generation that was begun."""
    found = enumerate(begun_facts(dataset))
    places = [(number, work_of(dataset, number), facts) for number, facts in found]
    return [
        Intake(work, read_table(work / LISTING, LISTING_SCHEMA), facts["classes"], number)
        for number, work, facts in places
    ]


def begin(
    config: PrepareConfig, dataset: Path, settings: dict[str, Any], found: Comparison
) -> Intake:
    """Let a generation take what is new in the sources."""
    number, classes = len(found.begun), found.begun[-1].classes if found.begun else []
    work, facts = work_of(dataset, number), begun_facts(dataset)
    write_table(work / LISTING, found.new)
    added = count_classes(config.sources, found.new)
    # Labels that are in use stay what they are.
    classes = [*classes, *(name for name in added if name not in classes)]
    said: dict[str, Any] = {"listed": found.num_new, "classes": classes}
    said["listing_sha256"] = listing_sha256(found.new)
    if number:
        said["missing"] = len(found.gone) + len(found.changed)
        said = facts[0] | {"grown": [*facts[1:], said]}
    write_text(dataset / WORK / "config.json", json.dumps(said | {"settings": settings}, indent=1))
    return Intake(work, found.new, classes, number)


def refuse_other_settings(output: str, begun: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raise InputError with every difference, but for sources that were added."""
    known, now = begun["config"].get("sources", {}), settings["config"]
    sources = {n: s for n, s in now.get("sources", {}).items() if n in known}
    same = settings | {"config": now | ({"sources": sources} if known else {})}
    changes = [
        f"  {key.removeprefix('config.')}: {old} -> {new}"
        for key, (old, new) in differences(begun, same).items()
    ]
    if changes:
        raise InputError(
            f"output: {output} was begun with another config:\n" + "\n".join(changes) + "\n"
            "Remedy: restore these, choose another output, or --restart to delete it and start anew."
        )


def refuse_changes(
    config: PrepareConfig, found: Comparison, allow_missing: bool, check: Callable[[], None]
) -> Comparison:
    """The comparison with what a second look at touched files finds.

    Raises InputError where files are gone or changed, unless that is allowed.
    """
    if allow_missing or not (found.gone or found.changed):
        more = {name for intake in found.begun for name in changed_content(config, intake, check)}
        found = replace(found, changed=[*({*found.changed} | more) - {*found.gone}])
    if said := found.misses(config.output):
        if not allow_missing:
            raise InputError(
                f"{said}. Remedy: restore them, --allow-missing to go on with the {found.num_new:,} new files "
                "(rename a changed one to have it read), another output, or --restart to delete it and start anew."
            )
        console.print(f"{said}.")
    return found


def unfinished(dataset: Path) -> list[int]:
    """The generations that are to be made or, having lost a shard, to be mended."""
    done, there = num_complete(dataset), find_files(dataset / "shards")

    def is_whole(number: int) -> bool:
        commits = sealed_commits(work_of(dataset, number))
        places = ((c["path"].split("/")[1], c.get("sizes", {})) for c in commits or ())
        sizes = {f"{folder}/{name}": size for folder, s in places for name, size in s.items()}
        return commits is not None and number < done and sizes.items() <= there.items()

    return [number for number in range(len(begun_facts(dataset))) if not is_whole(number)]


def num_complete(dataset: Path) -> int:
    """How many generations the manifest has whole."""
    there = (dataset / MANIFEST).is_file()
    return sum(g.complete for g in read_manifest(dataset).generations) if there else 0
