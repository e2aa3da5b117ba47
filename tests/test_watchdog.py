"""A rank killed, stopped, hung or failed: all end, with its name and where it was; without a launcher's help."""

import re
import signal
import time
from collections.abc import Iterator

import pytest

from tests import train_factory
from tests.forked import Forked, free_port

pytestmark = pytest.mark.distributed
Ranks = list[Forked]


@pytest.fixture
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """Two ranks by hand, so that nobody but the watchdog ends them; rank 0 holds the store."""
    harm, where = request.param
    words = ("tests.ranks_watchdog", harm, str(where))
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [
        train_factory.start(*words, merged=False, **address, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(2)
    ]
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def ended(process: Forked) -> str:
    """What a rank said at its end, which must come soon and not be a success."""
    _, errors = process.communicate(timeout=90)
    assert process.returncode not in (0, -signal.SIGKILL)
    return errors


@pytest.mark.parametrize("ranks", [("stop", 1)], indirect=True)
def test_a_stopped_rank_ends_the_others_with_its_name_and_its_stack(ranks):
    train_factory.wait_for(ranks[0], "step 10/")
    ranks[1].send_signal(signal.SIGSTOP)
    said = ended(ranks[0])
    assert re.search(rf"no answer for \d+ s from rank 1 \(pid {ranks[1].pid} on ", said)
    assert "ranks_watchdog.py" in said.split("last in:")[1].split("Current thread")[0]
    ranks[1].send_signal(signal.SIGCONT)
    ended(ranks[1])  # it finds itself accused, or the other gone


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [("stop", 0)], indirect=True)
def test_the_rank_that_holds_the_store_may_be_the_stopped_one(ranks):
    train_factory.wait_for(ranks[0], "step 10/")
    ranks[0].send_signal(signal.SIGSTOP)
    assert "the rendezvous store does not answer: rank 0" in ended(ranks[1])


@pytest.mark.parametrize("ranks", [("kill", 1)], indirect=True)
def test_a_killed_rank_ends_the_others_with_its_name(ranks):
    train_factory.wait_for(ranks[0], "step 10/")
    ranks[1].kill()
    said = ended(ranks[0])
    assert f"no answer from rank 1 (pid {ranks[1].pid} on " in said


@pytest.mark.parametrize("ranks", [("hang", 1)], indirect=True)
def test_a_rank_that_hangs_is_told_from_those_that_wait_for_it(ranks):
    said = [ended(process) for process in ranks]
    for text in said:
        assert "no step in 4 s. The ranks are at:" in text
        places = text.split("The ranks are at:")[1].split("Current thread")[0]
        own = places.split(f"rank 1 (pid {ranks[1].pid} on ")[1].split("rank 0")[0]
        assert "in sleep_for_ever" in own


@pytest.mark.parametrize(
    ("ranks", "where"),
    [(("raise", 0), 0), pytest.param(("raise", 1), 1, marks=pytest.mark.slow)],
    indirect=["ranks"],
)
def test_what_one_rank_raises_all_ranks_say(ranks, where):
    """Rank 0 as well, with which the store goes: not before the others have read there why."""
    said = [ended(process) for process in ranks]
    assert all("ValueError: no good" in text for text in said)
    assert f"rank {where} (pid {ranks[where].pid} on " in said[1 - where]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [("none", 0)], indirect=True)
def test_ranks_that_are_suspended_together_go_on(ranks):
    train_factory.wait_for(ranks[0], "step 10/")
    for process in ranks:
        process.send_signal(signal.SIGSTOP)
    time.sleep(8)  # longer than the silence that ends a run
    for process in ranks:
        process.send_signal(signal.SIGCONT)
    for process in ranks:
        _, errors = process.communicate(timeout=90)
        assert process.returncode == 0, errors
