"""Actors that are dear to start, and what they make of a stream of objects, in the stream's order.

In: how an actor is started, how many there shall be at least and at most, and references to objects. Out: what the actors' method
gave for each. An actor is given its next object while it works, so that the bytes are there when it is done; more actors are
started, one at a time, while all have enough to do and the cluster has a CPU left for those who make the objects. Holds `AHEAD`
objects an actor, and the results that wait for an earlier one.

Ray Data has pools, too. It hands its actors what they are made of through the object store, which Ray warns of on every start:
an actor that is started again after a node was lost may not find it. Here an actor's arguments travel with its start, so Ray can
start it again wherever it likes. Its options are the caller's: with `max_restarts` and `max_task_retries`, Ray itself starts a
dead actor again and gives it again what it had in hand.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray
from ray import ObjectRef

AHEAD = 2
WAIT_S = 3600.0
"""Longest wait for the first actor, as on a cluster that has yet to find nodes."""


class ActorPool:
    """least, most: how many actors there are. submit: gives an object to an actor, and a reference to what becomes of it.

    started_at: Unix time from which an actor was there; None before. To be closed: that ends the actors.
    """

    def __init__(self, start: Callable[[], Any], submit: Callable[[Any, ObjectRef], ObjectRef], least: int, most: int) -> None:
        self.started_at: float | None = None
        self._start, self._submit, self._most = start, submit, most
        self._starting: dict[ObjectRef, Any] = {}
        self._in_hand: dict[Any, set[ObjectRef]] = {}
        for _ in range(min(least, most)):
            self._add()

    def results(self, objects: Iterable[ObjectRef]) -> Iterator[Any]:
        """What became of each object, in their order.

        Raises what an actor raised, and `ValueError` where none has started within `WAIT_S`.
        """
        waiting: deque[ObjectRef] = deque()
        for each in objects:
            waiting.append(self._give(each))
            while waiting and ray.wait([waiting[0]], timeout=0, fetch_local=False)[0]:
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())

    def close(self) -> None:
        for actor in [*self._in_hand, *self._starting.values()]:
            ray.kill(actor)

    def _give(self, each: ObjectRef) -> ObjectRef:
        """Gives an object to the actor that has least in hand, once one has room."""
        self._look(timeout_s=0)
        while (actor := self._with_room()) is None:
            if self._in_hand and not self._starting and len(self._in_hand) < self._most and _has_room(len(self._in_hand)):
                self._add()
            self._look(timeout_s=None if self._in_hand else WAIT_S)
        result = self._submit(actor, each)
        self._in_hand[actor].add(result)
        return result

    def _add(self) -> None:
        actor = self._start()
        self._starting[actor.__ray_ready__.remote()] = actor

    def _with_room(self) -> Any | None:
        actor = min(self._in_hand, key=lambda each: len(self._in_hand[each]), default=None)
        return None if actor is None or len(self._in_hand[actor]) >= AHEAD else actor

    def _look(self, timeout_s: float | None) -> None:
        """Notes what has started and what is done, after waiting for one of either."""
        watched = [*self._starting, *(result for results in self._in_hand.values() for result in results)]
        if not watched:
            return
        done, _ = ray.wait(watched, num_returns=1 if timeout_s != 0 else len(watched), timeout=timeout_s, fetch_local=False)
        if not done and timeout_s:
            raise ValueError(f"no actor has started within {timeout_s:,.0f} s: the cluster has no room for one, lower run.actors")
        for reference in done:
            if (actor := self._starting.pop(reference, None)) is not None:
                ray.get(reference)
                self._in_hand[actor] = set()
                self.started_at = self.started_at or time.time()
            for results in self._in_hand.values():
                results.discard(reference)


def _has_room(actors: int) -> bool:
    """Whether one more, each on a CPU, leaves a CPU of the cluster free: without one, nobody makes what the actors wait for."""
    return actors + 1 < ray.cluster_resources().get("CPU", 0)
