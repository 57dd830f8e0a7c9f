"""Which documents a store has adapters for, as far as can be told before anything is tokenised: these need no tokenising.

In: contents, by tenant and hash. Out: those with an adapter of the method and encoding in question. That is a guess, for no
weights are loaded here, so their fingerprint is not known: adapters may be another hypernetwork's. Whoever relies on it looks
again with the producer in hand, and tokenises what the guess left out, at 4 us a token in the actors. Where a producer is new
to the store, the guess is right from its first commit on, as then only what it has put counts.

Cost: a listing and a look-up a block. Each process that asks has the store open, with `CACHE_BYTES` of rows at most.
"""

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from core.codec import Encoding
from core.manifest import StoreError
from core.store import Store

log = logging.getLogger(__name__)

CACHE_BYTES = 2**26


class KnownContents(NamedTuple):
    """What to look for, in which store; `before` are the fingerprints of the method's producers when the run began."""

    store_url: str
    method: str
    encoding: Encoding
    before: frozenset[str]

    @classmethod
    def of(cls, store_url: str, method: str, encoding: Encoding) -> "KnownContents | None":
        """None where the method has written nothing there, so that there is nothing to look for."""
        before = frozenset(_of_method(Store.open(store_url), method))
        return cls(store_url, method, encoding, before) if before else None

    def among(self, contents: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
        """Those of (tenant, content hash) that probably need not be read; none where the store is out of reach, as on a node that
        only prepares."""
        try:
            store = opened(self.store_url)
            store.refresh()
            producers, found = _of_method(store, self.method), store.find_adapters_of(contents)
        except (StoreError, OSError) as error:
            log.warning("documents are read whether or not they are in %s: %s", self.store_url, error)
            return set()
        wanted = producers - self.before or producers
        return {
            content
            for content, adapters in found.items()
            if any(row.producer_fingerprint in wanted and row.encoding == self.encoding for row in adapters)
        }


@lru_cache(maxsize=1)
def opened(store_url: str) -> Store:
    """A store, opened once in each process that prepares rows."""
    return Store.open(store_url, cache_bytes=CACHE_BYTES)


def _of_method(store: Store, method: str) -> set[str]:
    return {fingerprint for fingerprint, producer in store.producers().items() if producer.method == method}
