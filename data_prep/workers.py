"""Ray: how preparation connects, and how work is done whose worker may die.

`Tasks` works on the cluster's CPUs; `Actors` are processes that hold what is slow to open, and a GPU, for
their whole life, under the same scheduler. Work comes in groups of items, and a worker answers the items
of its group one by one. When it dies the first item without an answer is the suspect: the suspect gets a
worker for itself, the rest of its group goes on without it. A suspect that has killed ATTEMPTS workers is
handed back as LOST. A worker that went with its node, or that Ray ended because its node's memory was full,
is weaker evidence.
"""

import errno
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

# What Ray would print of a lost worker, a page for each; `Tasks` says it in a line.
os.environ.setdefault(
    "RAY_DEDUP_LOGS_SKIP_REGEX",
    "A worker died or was killed|killed due to memory pressure|has been marked dead",
)

import ray
from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfDiskError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
)

from data_prep.config import RayConfig
from data_prep.text import encodable
from models.config import InputError
from models.files import FULL, store_error

# Workers that an item may lose: an innocent one may meet an outside kill, hardly three times.
ATTEMPTS = 3
# Losses with other causes than the item, as a rule, and how many of them weigh as much as one death.
OUTSIDE = (NodeDiedError, OutOfMemoryError, ObjectLostError, ActorUnavailableError)
OUTSIDE_PER_DEATH = 4
# What the error of an actor says then, which is of one class whatever the actor died of.
NODE_DIED = "node has died"
# Losses per worker, with no answer between them, after which the trouble is not in the items.
PATIENCE = OUTSIDE_PER_DEATH * ATTEMPTS
# The longest wait for memory to become free.
MEMORY_WAIT_S = 10.0
# One call decodes while the other encodes.
CALLS_PER_ACTOR = 2
# Addresses and records pass through the object store, pictures never.
OBJECT_STORE_BYTES = 256 << 20
SAY_EVERY_S = 20.0
# The answer to an item that killed its workers.
LOST = object()

Item = tuple[Any, ...]


def connect(config: RayConfig) -> None:
    """Join the cluster that RAY_ADDRESS names, else start a Ray of our own; raises InputError."""
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("http"):
        raise InputError(
            f"RAY_ADDRESS: got {address}, a dashboard's address, expected HOST:PORT of the cluster. "
            "Remedy: unset it, or submit: ray job submit --working-dir . -- python -m data_prep.prepare ..."
        )
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own: dict[str, Any] = {"num_cpus": config.num_cpus, "include_dashboard": False}
    own |= {"object_store_memory": OBJECT_STORE_BYTES}
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    ray.init(address or "local", **quiet, **({} if address else own))


@dataclass
class _Group:
    """What one worker does in turn; a group with deaths is a single item under suspicion."""

    items: deque[Item]
    deaths: float = 0

    @property
    def weight(self) -> int:
        """Calls that it fills: a suspect has its worker to itself, lest it take an innocent with it."""
        return CALLS_PER_ACTOR if self.deaths else 1


class Tasks:
    """Workers that hold nothing, which Ray shows by `name`; `run` takes a function."""

    def __init__(self, name: str, say: Callable[[str], None]):
        self._say, self._said = say, time.monotonic()
        # Ray would retry a group whole, where here its suspect is retried alone.
        remote = ray.remote(num_returns="streaming", max_calls=0, max_retries=0)(_answers)
        self._remote = remote.options(name=name)
        # By what an actor that is beginning will say once it has begun.
        self._beginning: dict[Any, Any] = {}
        self._losses_in_a_row = 0

    def run(self, work: Any, groups: Iterable[Iterable[Item]]) -> Iterator[tuple[Item, Any]]:
        """Every item with the answer to it, or LOST, in any order; raises what the work raises."""
        todo = (_Group(deque(items)) for items in groups)
        queue, flying = deque[_Group](), dict[Any, tuple[Any, _Group]]()
        while True:
            load = Counter[Any]()
            for place, group in flying.values():
                load[place] += group.weight
            while queue or (queue := deque(islice(todo, 1))):
                if (place := self._place(load, queue[0].weight)) is None:
                    break
                group = queue.popleft()
                load[place] += group.weight
                flying[self._start(place, work, list(group.items))] = place, group
            if not (flying or queue):
                return
            for stream in self._wait(flying):
                place, group = flying[stream]
                try:
                    answer = value(next(stream))
                except StopIteration:
                    del flying[stream]
                except RayTaskError:
                    raise
                except RayError as error:
                    del flying[stream]
                    if self._replace(place):
                        self._say(f"{_loss(error)}; its work is tried again")
                    # All may be answered, and the end of the stream alone be lost.
                    if not group.items:
                        continue
                    suspect = group.items.popleft()
                    if group.items:
                        queue.append(_Group(group.items))
                    deaths = group.deaths + self._weigh(error)
                    if deaths < ATTEMPTS:
                        queue.appendleft(_Group(deque([suspect]), deaths))
                    else:
                        yield suspect, LOST
                else:
                    self._losses_in_a_row = 0
                    yield group.items.popleft(), answer

    def run_all(
        self, work: Any, trial: Any, groups: Iterable[Iterable[Item]], parts: Callable[[Item], int]
    ) -> Iterator[tuple[Item, Any]]:
        """Every item with its answer, the parts that kill left out; LOST where no part alone does.

        `work` takes an item, and the places of the parts to leave out; `trial` an item and one place.
        """
        lost = list[Item]()
        for item, answer in self.run(work, groups):
            if answer is LOST:
                lost.append(item)
            else:
                yield item, answer
        # Each part alone shows which of them kill. The others are then worked on as if those had been
        # left out from the first, so that the answer does not depend on what the search met.
        for item in lost:
            deadly = [0]
            if (count := parts(item)) > 1:
                tried = self.run(trial, ([(*item, place)] for place in range(count)))
                deadly = sorted(place for (*_, place), answer in tried if answer is LOST)
            ((_, answer),) = self.run(work, [[(*item, deadly)]])
            yield item, answer

    def _weigh(self, error: RayError) -> float:
        """How much of a death a loss is; raises InputError where too many follow each other."""
        self._losses_in_a_row += 1
        if self._losses_in_a_row > PATIENCE * self._size():
            raise InputError(
                f"{self._losses_in_a_row} workers in a row were lost before they had done anything, the last "
                f"by {type(error).__name__}. Remedy: see Ray's log; where memory is short, lower "
                "encode.batch_size, or ray.num_actors and ray.num_cpus; then run it again to go on."
            ) from error
        if isinstance(error, OutOfMemoryError):
            time.sleep(min(self._losses_in_a_row, MEMORY_WAIT_S))
        is_outside = isinstance(error, OUTSIDE) or NODE_DIED in str(error)
        return 1 / OUTSIDE_PER_DEATH if is_outside else 1.0

    def _wait(self, flying: dict[Any, Any]) -> list[Any]:
        """Those that have something new, after a second at most; says now and then what is waited for."""
        ready, others = ray.wait([*flying, *self._beginning], timeout=1.0, fetch_local=False)
        # With hundreds of actors several answer while one answer is dealt with.
        if ready and others:
            ready += ray.wait(others, num_returns=len(others), timeout=0, fetch_local=False)[0]
        if time.monotonic() - self._said > SAY_EVERY_S:
            self._said = time.monotonic()
            if message := self.waits_for():
                self._say(message)
        return [stream for stream in ready if stream in flying]

    # What differs where workers hold something.

    def _size(self) -> int:
        """How many workers there are meant to be."""
        return num_cpus()

    def _place(self, load: Counter[Any], weight: int) -> Any | None:
        """Where there is room for so many calls more."""
        return "a CPU" if load.total() < 2 * num_cpus() else None

    def _start(self, place: Any, work: Any, items: list[Item]) -> Any:
        """The stream of answers to the items."""
        return self._remote.remote(work, items)

    def _replace(self, place: Any) -> bool:
        """Do what the loss of a worker asks for; returns whether it was not known yet."""
        return True

    def waits_for(self) -> str | None:
        """What the cluster lacks for the work to go on at full speed, in words."""
        enough = ray.cluster_resources().get("CPU", 0) >= 1
        return None if enough else f"waiting for a CPU to work on; {_cluster()}"


def num_cpus() -> int:
    """The cluster's CPUs, 1 where it has none."""
    return max(int(ray.cluster_resources().get("CPU", 1)), 1)


class Worker:
    """Base of an actor's body: it is made with settings and the number of its decoders."""

    def describe(self) -> Any:
        """Open what the work needs; returns what is to be said of it. Called before there is work."""

    def answers(self, method: str, items: list[Item]) -> Iterator[Any]:
        yield from _answers(getattr(self, method), items)


def _answers(function: Callable[..., Any], items: list[Item]) -> Iterator[Any]:
    for item in items:
        try:
            answer = function(*item)
        except InputError as error:
            # Ray's message to the driver must be UTF-8, or the worker dies of it.
            raise InputError(encodable(str(error))) from None
        except Exception as error:
            if said := store_error(error):
                raise InputError(encodable(said)) from None
            raise
        except BaseException:  # noqa: BLE001
            # A panic of a compiled library, such as a tokenizer's, leaves it in no known state.
            os._exit(1)
        yield answer


@dataclass(frozen=True)
class Shares:
    """What each of the actors gets of the machine or the cluster."""

    num_actors: int
    cpus: float
    gpus: float
    decoders: int
    memory: int = 0
    """Bytes that Ray reserves, 0 for none."""


def share_out(config: RayConfig, threads: int, most: int, weight: int = 0) -> Shares:
    """At most `most` actors, which without GPUs use `threads` CPUs and `weight` bytes each; raises InputError."""
    resources = ray.cluster_resources()
    num_gpus, num_cpus = resources.get("GPU", 0.0), max(resources.get("CPU", 1.0), 1.0)
    gpus = float(num_gpus > 0) if config.gpus_per_actor is None else config.gpus_per_actor
    places = num_gpus / gpus if gpus else num_cpus / threads
    # A cluster's autoscaler may bring what is not there yet.
    if (config.num_actors or 1) * gpus > num_gpus and "RAY_ADDRESS" not in os.environ:
        raise InputError(
            f"ray: {config.num_actors or 1} actors of {gpus:g} GPUs each, expected no more than the "
            f"{num_gpus:g} GPUs there are. Remedy: lower ray.num_actors or ray.gpus_per_actor."
        )
    memory = 0
    if weight and not gpus and config.num_actors is None:
        fit = sum(node["Resources"].get("memory", 0) // weight for node in ray.nodes())
        # One that fits nowhere is tried all the same.
        memory, places = (weight if fit else 0), min(places, fit)
    num_actors = min(config.num_actors or max(int(places), 1), most)
    spare = int(num_cpus / num_actors) - threads
    cpus = 1.0 if gpus else min(float(threads), num_cpus / num_actors)
    # Ray divides one CPU, not several.
    cpus = cpus if cpus < 1 else int(cpus)
    return Shares(num_actors, cpus, gpus, config.decoders_per_actor or max(spare, 1), memory)


class Actors(Tasks):
    """Workers that hold what they have opened, and their GPU, until they die; `run` takes a method's name.

    Ray changes a task's CUDA_VISIBLE_DEVICES from one call to the next, which a process that has opened
    CUDA ignores; it never changes an actor's. An actor gets work once it has begun: one in a lost one's
    place may wait for room for ever.
    """

    def __init__(
        self, body: type[Worker], settings: Any, shares: Shares, say: Callable[[str], None]
    ):
        super().__init__(body.__name__, say)
        remote = ray.remote(body).options(  # pyright: ignore[reportAttributeAccessIssue]
            num_cpus=shares.cpus,
            num_gpus=shares.gpus,
            memory=shares.memory or None,
            max_concurrency=CALLS_PER_ACTOR,
        )
        self._make: Callable[[], Any] = lambda: remote.remote(settings, shares.decoders)
        self._shares, self._begun, self._description = shares, list[Any](), None
        for _ in range(shares.num_actors):
            self._begin()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the actors: their GPUs are free at once, not when Python finds that nobody holds them."""
        for actor in [*self._begun, *self._beginning.values()]:
            ray.kill(actor)

    def describe(self) -> Any:
        """What an actor says of itself, waited for until one has begun; raises InputError."""
        while not self._begun:
            self._wait({})
        return self._description

    def _begin(self) -> None:
        actor = self._make()
        self._beginning[actor.describe.remote()] = actor

    def _wait(self, flying: dict[Any, Any]) -> list[Any]:
        streams = super()._wait(flying)
        starts = list(self._beginning)
        for start in ray.wait(starts, num_returns=len(starts), timeout=0)[0] if starts else []:
            actor = self._beginning.pop(start)
            try:
                self._description = value(start)
                self._begun.append(actor)
            except RayTaskError:
                raise
            except RayError as error:
                self._say(f"{_loss(error)} before it had begun; another begins")
                self._weigh(error)
                self._begin()
        return streams

    def _place(self, load: Counter[Any], weight: int) -> Any | None:
        room = (a for a in self._begun if load[a] + weight <= CALLS_PER_ACTOR)
        return min(room, key=lambda actor: load[actor], default=None)

    def _start(self, place: Any, work: Any, items: list[Item]) -> Any:
        return place.answers.remote(work, items)

    def _replace(self, place: Any) -> bool:
        """Begin a new actor in the lost one's place, once, though all its calls fail."""
        if place not in self._begun:
            return False
        self._begun.remove(place)
        ray.kill(place)
        self._begin()
        return True

    def _size(self) -> int:
        return self._shares.num_actors

    def waits_for(self) -> str | None:
        if not self._beginning:
            return None
        shares = self._shares
        wanted = {"CPUs": shares.cpus, "GPUs": shares.gpus, "MiB": shares.memory >> 20}
        words = " and ".join(f"{number:.10g} {what}" for what, number in wanted.items() if number)
        return (
            f"{len(self._beginning)} of {shares.num_actors} actors load their encoders, or wait "
            f"for a place: each takes {words}; {_cluster()}"
        )


def _loss(error: RayError) -> str:
    """What happened to a worker, in words."""
    if isinstance(error, OutOfMemoryError):
        return "the memory of a node is full, for which Ray ended a worker"
    with_node = isinstance(error, NodeDiedError) or NODE_DIED in str(error)
    return f"a worker {'was lost with its node' if with_node else 'died'}"


def value(reference: Any) -> Any:
    """The value, or the error that the worker's code raised, as itself where it is the user's."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise InputError(str(error.cause)) from None
        if isinstance(error.cause, OSError) and error.cause.errno in FULL:
            raise error.cause from None
        raise
    except OutOfDiskError as error:
        raise OSError(errno.ENOSPC, "", "Ray's temporary folder") from error


def _cluster() -> str:
    """What the cluster has and what of it is free, in words."""
    nodes = sum(node["Alive"] for node in ray.nodes())
    total, free = ray.cluster_resources(), ray.available_resources()
    parts = [f"{free.get(k, 0):g} of {total.get(k, 0):g} {k}s" for k in ("CPU", "GPU")]
    return f"the cluster has {nodes} nodes, free are {' and '.join(parts)}"
