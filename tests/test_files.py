"""Whole or absent, on disk before it has a name."""

import errno
import os
import stat
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


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_that_cannot_force_names_to_disk_is_written_to_all_the_same(
    tmp_path, monkeypatch, capfd, number
):
    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").write_text("x")
    monkeypatch.setattr(os, "fsync", fsync)
    publish(tmp_path / "new", tmp_path / "whole")
    write_text(tmp_path / "whole" / "file", "y")
    assert (tmp_path / "whole" / "file").read_text() == "y"
    assert capfd.readouterr() == ("", "")


def test_a_disk_that_fails_is_no_file_system_that_cannot(tmp_path, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="I/O error"):
        write_text(tmp_path / "x", "y")
    assert not list(tmp_path.iterdir())
