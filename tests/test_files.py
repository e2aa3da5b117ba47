"""Whole or absent, on disk before it has a name."""

import os
from functools import partial
from pathlib import Path

import pytest

from models.files import publish, write_text, write_whole


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    write_text(tmp_path / "x", "old")

    def fail(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "x", fail)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "old"


def test_all_of_a_folder_is_on_disk_before_its_name_is_and_the_name_after(tmp_path, monkeypatch):
    events = []

    def note(function, *arguments):
        place = os.readlink(f"/proc/self/fd/{arguments[0]}") if len(arguments) == 1 else "renamed"
        events.append(place)
        return function(*arguments)

    (tmp_path / "new" / "below").mkdir(parents=True)
    (tmp_path / "new" / "below" / "file").write_text("x")
    monkeypatch.setattr(os, "fsync", partial(note, os.fsync))
    monkeypatch.setattr(os, "replace", partial(note, os.replace))
    publish(tmp_path / "new", tmp_path / "whole")
    assert (tmp_path / "whole" / "below" / "file").read_text() == "x"
    names = ["below", "file", "new", "renamed", tmp_path.name]
    assert [Path(event).name for event in events] == names
    events.clear()
    write_text(tmp_path / "a.txt", "x")
    assert [Path(event).name == "renamed" for event in events] == [False, True, False]
