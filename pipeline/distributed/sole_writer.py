"""Alone in a run's folder: rank 0 holds the lock for all ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Self

from models.config import InputError
from models.lock import Lock
from pipeline import distributed


class SoleWriter:
    """A context in which these ranks alone write to a run's folder. Entering it and `check` are collective.

    Both raise InputError, on all ranks, where another run is writing there.
    """

    def __init__(self, folder: Path):
        self._lock = Lock(folder / "lock.json", "run", distributed.say)

    def __enter__(self) -> Self:
        _on_main(self._lock.__enter__)
        return self

    def __exit__(self, *_: object) -> None:
        if distributed.is_main():
            self._lock.__exit__()

    @property
    def lost(self) -> bool:
        """Whether this rank knows that another run has taken the folder over."""
        return distributed.is_main() and self._lock.lost

    def check(self) -> None:
        """To be called before files appear under their names."""
        _on_main(self._lock.check)


def _on_main(function: Callable[[], object]) -> None:
    """Call it on rank 0; its InputError is raised on all ranks. Collective."""
    message = None
    if distributed.is_main():
        try:
            function()
        except InputError as error:
            message = str(error)
    if message := distributed.gather_objects(message)[0]:
        raise InputError(message)
