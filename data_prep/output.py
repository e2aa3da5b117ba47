"""The output folder: whose it is, and whether it may be written to."""

import json
import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from data_prep.config import LayerConfig, PrepareConfig
from data_prep.plan import shard_list
from data_prep.report import console
from data_prep.scan import LISTING, LISTING_SCHEMA, listing_sha256, split_others
from data_prep.schema import AUDITED, MANIFEST, read_manifest
from data_prep.shards import WORK, read_commits, read_table, write_table, write_text
from data_prep.sources.classes import count_classes
from data_prep.storage import delete, is_remote, names_in, open_root, patient
from models.config import InputError, differences
from models.lock import Lock

OURS = (MANIFEST, *AUDITED, "shards", WORK)
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
) -> tuple[Path, pa.Table]:
    """The output folder, of these settings and sources; raises InputError where it is of others.

    Returns the listing as well, its files that are no pictures as they were when the output was begun.
    """
    dataset = open_root(config.output, "output")
    work = dataset / WORK
    try:
        if restart:
            # config.json, and with it the right to resume, goes first.
            for path in (work / "config.json", *(dataset / name for name in OURS)):
                if count := delete(path):
                    console.print(f"deleted {path} ({count} files)")
        if (work / "config.json").exists():
            begun = json.loads((work / "config.json").read_text())
            refuse_other_settings(config.output, begun["settings"], settings)
            listing = _refuse_other_sources(config.output, work, listing)
        else:
            write_table(work / LISTING, listing)
            decisive, _ = split_others(listing)
            classes = count_classes(config.sources, listing)
            begun = {"settings": settings, "listed": len(decisive), "classes": list(classes)}
            begun["listing_sha256"] = listing_sha256(listing)
            write_text(work / "config.json", json.dumps(begun, indent=1))
    except OSError as error:
        why = error.strerror or error
        raise InputError(f"output: cannot write {config.output}: {why}") from error
    return dataset, listing


def refuse_other_settings(output: str, begun: dict[str, Any], settings: dict[str, Any]) -> None:
    changes = [
        f"  {key.removeprefix('config.')}: {old} -> {new}"
        for key, (old, new) in differences(begun, settings).items()
    ]
    if changes:
        raise InputError(
            f"output: {output} was begun with another config:\n" + "\n".join(changes) + "\n"
            "Remedy: restore these, choose another output, or --restart to delete it and start anew."
        )


def _refuse_other_sources(output: str, work: Path, listing: pa.Table) -> pa.Table:
    decisive, others = split_others(read_table(work / LISTING, LISTING_SCHEMA))
    listing, _ = split_others(listing)
    # A stamp is a hint, no change.
    before, now = (table.drop_columns(["stamp"]) for table in (decisive, listing))
    if before.equals(now):
        return pa.concat_tables([listing, others])
    old = {(row["source"], row["name"]): row for row in before.to_pylist()}
    new = {(row["source"], row["name"]): row for row in now.to_pylist()}
    changed = [name for name in old.keys() & new.keys() if old[name] != new[name]]
    groups = {"added": new.keys() - old.keys(), "gone": old.keys() - new.keys(), "changed": changed}
    found = [f"{len(g)} {word} ({'/'.join(min(g))}, ...)" for word, g in groups.items() if g]
    raise InputError(
        f"sources: not what they were when {output} was begun: files {', '.join(found)}. "
        "Remedy: restore them, choose another output, or --restart to delete it and start anew."
    )


def is_complete(dataset: Path) -> bool:
    """Whether there is a manifest and every shard that it speaks of."""
    if not (dataset / MANIFEST).is_file():
        return False
    read_manifest(dataset)
    return all(read_commits(dataset, [spec.path for spec in shard_list(dataset)]))
