"""Ray: how preparation connects, and how work that may lose its worker is done all the same."""

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray
from pydantic import Field
from ray.exceptions import RayError, RayTaskError, WorkerCrashedError

from models.config import Config, InputError

ATTEMPTS = 5  # of one piece of work whose worker died
CALLS_PER_ACTOR = 2  # one decodes while the other encodes
OBJECT_STORE_BYTES = 256 << 20  # addresses and records pass through it, pictures never
SAY_EVERY_S = 20.0  # what is waited for


class RayConfig(Config):
    """How fast, never what. Null: what the machine or the cluster has."""

    num_cpus: int | None = Field(default=None, ge=1)  # of the embedded Ray; a cluster knows its own
    num_actors: int | None = Field(
        default=None, ge=1
    )  # null: one a GPU, or one an encode.threads CPUs
    gpus_per_actor: float | None = Field(default=None, ge=0)  # null: 1 where there are GPUs
    decoders_per_actor: int | None = Field(
        default=None, ge=1
    )  # null: the CPUs that are left, shared out


def in_ray_job() -> bool:
    """Whether `ray job submit` runs us."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


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
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        ray.init(address=address, **quiet)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(
        address="local",
        num_cpus=config.num_cpus,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        **quiet,
    )


def run_tasks(
    function: Callable[..., Any],
    work: Iterable[tuple[Any, ...]],
    lost: Callable[..., bool],
    say: Callable[[str], None],
) -> Iterator[Any]:
    """Results of function(*arguments) on the cluster's CPUs, in any order; a bounded number at a time.

    Of work that killed all its workers, lost(attempts, *arguments) may say that it has dealt with it.
    Where there is no CPU to work on, `say` is told.
    """
    remote = ray.remote(function).options(max_retries=ATTEMPTS)
    todo, flying = iter(work), dict[Any, tuple[Any, ...]]()
    while True:
        limit = 2 * max(int(ray.cluster_resources().get("CPU", 1)), 1)
        while len(flying) < limit and (arguments := next(todo, None)) is not None:
            flying[remote.remote(*arguments)] = arguments
        if not flying:
            return
        ready, _ = ray.wait(list(flying), timeout=SAY_EVERY_S)
        if not ready and ray.cluster_resources().get("CPU", 0) < 1:
            say(f"waiting for a CPU to scan with; {_cluster()}")
        for reference in ready:
            arguments = flying.pop(reference)
            try:
                yield result(reference)
            except WorkerCrashedError:
                if not lost(ATTEMPTS + 1, *arguments):
                    raise
                yield None


def _cluster() -> str:
    """What the cluster has and what of it is free, in words."""
    nodes = sum(node["Alive"] for node in ray.nodes())
    total, free = ray.cluster_resources(), ray.available_resources()
    parts = [f"{free.get(k, 0):g} of {total.get(k, 0):g} {k}s" for k in ("CPU", "GPU")]
    return f"the cluster has {nodes} nodes, free are {' and '.join(parts)}"


def result(reference: Any) -> Any:
    """The value, or the error that the worker's code raised, as itself where it is the user's."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise InputError(str(error.cause)) from None
        raise


class ActorPool:
    """Actors of one kind; a dead one is replaced, and its work given to another."""

    def __init__(
        self, body: type, arguments: tuple[Any, ...], config: RayConfig, threads: int, most: int
    ):
        resources = ray.cluster_resources()
        num_gpus, num_cpus = resources.get("GPU", 0.0), max(resources.get("CPU", 1.0), 1.0)
        gpus = config.gpus_per_actor
        gpus = (1.0 if num_gpus else 0.0) if gpus is None else gpus
        places = num_gpus / gpus if gpus else num_cpus / threads
        # A cluster's autoscaler may bring what is not there yet.
        grows = "RAY_ADDRESS" in os.environ
        if gpus and (config.num_actors or 1) * gpus > num_gpus and not grows:
            raise InputError(
                f"ray: {config.num_actors or 1} actors of {gpus:g} GPUs each, expected no more than the "
                f"{num_gpus:g} GPUs there are. Remedy: lower ray.num_actors or ray.gpus_per_actor."
            )
        self.num_actors = min(config.num_actors or max(int(places), 1), most)
        spare = int(num_cpus / self.num_actors) - threads
        decoders = config.decoders_per_actor or max(spare, 1)
        cpus = 1.0 if gpus else min(float(threads), num_cpus / self.num_actors)
        remote = ray.remote(body).options(  # pyright: ignore[reportAttributeAccessIssue]
            num_cpus=cpus if cpus < 1 else int(cpus),
            num_gpus=gpus,
            max_concurrency=CALLS_PER_ACTOR + 1,  # and a question about progress
        )
        self._wanted = f"{cpus:g} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        self._start: Callable[[], Any] = lambda: remote.remote(*arguments, decoders)
        self._actors = [self._start() for _ in range(self.num_actors)]
        self._ready = [actor.__ray_ready__.remote() for actor in self._actors]
        self._up = set[int]()  # slots whose actor is known to have begun
        self._polls: dict[int, tuple[Any, int]] = {}  # slot -> question asked, last answer
        self._said = time.monotonic()

    def ask(self, method: str, *arguments: Any, tick: Callable[[], None] = lambda: None) -> Any:
        """The answer of any one actor."""
        return next(self.run(method, [arguments], tick))

    def run(
        self, method: str, work: Iterable[tuple[Any, ...]], tick: Callable[[], None]
    ) -> Iterator[Any]:
        """Results of actor.method(*arguments), in any order; `tick` is called about once a second.

        An actor gets work once it has begun: one in a lost one's place may wait for room for ever.
        """
        self._said = time.monotonic()
        todo, again, left = iter(work), deque[tuple[tuple[Any, ...], int]](), True
        flying: dict[Any, tuple[Any, tuple[Any, ...], int]] = {}
        while True:
            busy = Counter(id(actor) for actor, _, _ in flying.values())
            for slot in [*range(self.num_actors)] * CALLS_PER_ACTOR:
                actor = self._actors[slot]
                if busy[id(actor)] == CALLS_PER_ACTOR or not self._is_up(slot):
                    continue
                arguments, attempts = again.popleft() if again else (next(todo, None), 0)
                if arguments is None:
                    left = False
                    break
                flying[getattr(actor, method).remote(*arguments)] = (actor, arguments, attempts + 1)
                busy[id(actor)] += 1
            if not (flying or left or again):
                return
            ready, others = ray.wait(list(flying) or self._ready, timeout=1.0)
            ready = ready if flying else []
            if ready and others:  # with hundreds of actors several end while one is dealt with
                ready += ray.wait(others, num_returns=len(others), timeout=0)[0]
            for reference in ready:
                actor, arguments, attempts = flying.pop(reference)
                try:
                    yield result(reference)
                except RayTaskError:
                    raise
                except RayError as error:  # the actor, its node, or the answer is lost
                    if attempts == ATTEMPTS:
                        raise RuntimeError(
                            f"{method}{arguments[:1]}: lost its worker {attempts} times"
                        ) from error
                    again.append((arguments, attempts))
                    self._replace(actor)
            tick()

    def _is_up(self, slot: int) -> bool:
        if slot not in self._up and ray.wait([self._ready[slot]], timeout=0)[0]:
            self._up.add(slot)
        return slot in self._up

    def _replace(self, actor: Any) -> None:
        """A new actor in the lost one's place, once, though all its calls fail."""
        if actor in self._actors:
            slot = self._actors.index(actor)
            ray.kill(actor)
            self._actors[slot] = self._start()
            self._ready[slot] = self._actors[slot].__ray_ready__.remote()
            self._polls.pop(slot, None)
            self._up.discard(slot)

    def unscheduled(self) -> str | None:
        """Every SAY_EVERY_S, what actors that have no place yet wait for; None where all have one."""
        if time.monotonic() - self._said < SAY_EVERY_S:
            return None
        self._said = time.monotonic()
        count = len(ray.wait(self._ready, num_returns=self.num_actors, timeout=0)[1])
        if not count:
            return None
        return (
            f"waiting for {count} of {self.num_actors} actors to be scheduled, each of which wants "
            f"{self._wanted}; {_cluster()}"
        )

    def poll(self, method: str) -> int:
        """Sum of the actors' last answers to `method`; asks again without waiting."""
        for slot, actor in enumerate(self._actors):
            question, answer = self._polls.get(slot, (None, 0))
            if question is not None:
                if not ray.wait([question], timeout=0)[0]:
                    continue
                try:
                    answer = int(ray.get(question))  # pyright: ignore[reportArgumentType]
                except RayError:
                    answer = 0
            self._polls[slot] = (getattr(actor, method).remote(), answer)
        return sum(answer for _, answer in self._polls.values())
