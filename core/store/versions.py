"""The version that one process answers from, and the next one that it makes.

In: the objects of a store. Out: an `Index` of the newest version it has seen; versions made by optimistic concurrency. A change
is asked what the next root is, that root is created, which succeeds for one writer only, and whoever loses asks again on the
winner's version: both land. Knows nothing of documents and blobs.

Whoever collects what no root names (`core.store.upkeep.collection`) leaves alone what is younger than `MIN_GRACE_S`. What a
commit is about to name must therefore be younger: a change that took longer than `LONGEST_CHANGE_S`, from its first blob on, is
refused.

Cost of a commit: one object (two every 16th time); of a race that is lost, two look-ups, a listing and a root more.
"""

import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from core.store.errors import MissingObject, StoreError
from core.store.index import Index
from core.store.objects import Objects
from core.store.part_reader import PartReader
from core.store.roots import Root, Roots, root_name

LONGEST_CHANGE_S = 1800
MIN_GRACE_S = 2 * LONGEST_CHANGE_S
_ATTEMPTS = 200
_PAUSE_S = 0.005

AnswerT = TypeVar("AnswerT")


class Versions:
    """The versions of a store, for any number of threads. Begins before the first: `refresh` goes to the newest."""

    def __init__(self, objects: Objects, cache_bytes: int) -> None:
        self.reader = PartReader(objects, cache_bytes)
        self.roots = Roots(objects)
        self._url = objects.url
        self._index = Index(Root(), self.reader)
        self._refreshing = threading.Lock()
        self._committing = threading.RLock()

    @property
    def index(self) -> Index:
        return self._index

    def begin(self) -> bool:
        """Goes to the newest version for the first time; False where there is none."""
        with self._refreshing:
            newest = self.roots.newest()
            if newest is not None:
                self._index = Index(self.roots.read(newest), self.reader)
            return newest is not None

    def refresh(self) -> bool:
        """Goes to the newest version; says whether there was a newer one. On an error the version stays as it was."""
        with self._refreshing:
            here = self._index.root.sequence
            newest = self.roots.newest(here)
            if newest is None or newest < here:
                raise StoreError(f"{root_name(here)} has gone from {self._url}: open the store again")
            if newest == here:
                return False
            self._index = Index(self.roots.read(newest), self.reader)
            return True

    def ask(self, question: Callable[[Index], AnswerT]) -> AnswerT:
        """The answer from the present version; from the newest one where a part of it has been collected meanwhile.

        Raises `MissingObject` only for a part of the newest version, whichever thread went to it.
        """
        while True:
            index = self._index
            try:
                return question(index)
            except MissingObject:
                self.refresh()
                if self._index is index:
                    raise

    def commit(self, change: Callable[[Index], Root | None], began_s: float | None = None) -> Root | None:
        """Makes the version that `change` gives (by `Root.next`); None where it gives None, for there is nothing left to do.

        It is asked again, on another version, after each race that was lost. began_s: by the monotonic clock, before the first of
        what the version names was written; now by default. An `OSError` leaves open whether the version was made. Raises
        `StoreError` where races are lost without end, and for a change that took too long.
        """
        began_s = time.monotonic() if began_s is None else began_s
        with self._committing:
            for attempt in range(_ATTEMPTS):
                root = self.ask(change)
                if root is None:
                    return None
                if is_late(began_s):
                    raise StoreError(
                        f"a change to {self._url} took more than {LONGEST_CHANGE_S / 60:.0f} minutes, and what it wrote may have "
                        f"been collected as orphaned: begin it again, in smaller batches"
                    )
                if self.roots.create(root):
                    with self._refreshing:
                        if root.sequence > self._index.root.sequence:
                            self._index = Index(root, self.reader)
                    return root
                time.sleep(random.uniform(0, _PAUSE_S * min(attempt, 10)))
                self.refresh()
        raise StoreError(f"lost {_ATTEMPTS} races to commit to {self._url}: try again")


def is_late(began_s: float) -> bool:
    """Whether a change that began then, by the monotonic clock, may no longer be committed."""
    return time.monotonic() - began_s > LONGEST_CHANGE_S
