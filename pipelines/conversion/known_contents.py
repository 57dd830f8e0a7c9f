"""Which documents a store has adapters for, as far as can be told before anything is tokenised: these need no tokenising.

In: contents, by tenant and hash. Out: those that have an adapter of the encoding in question by every producer of the method that
the store knows. That is a guess, for no weights are loaded here: which of these producers is the run's, nobody can say. Whoever
relies on it looks again with the producer in hand, and tokenises what was guessed in vain, at 4 us a token in the actors that
make adapters. Once the store has a commit of the run's producer, by this run or an earlier one, nothing is guessed in vain;
before that, all is that the others have converted. What one of the others lacks is never guessed, and is tokenised by tasks.

Cost: a listing and a look-up a block. Each process that asks has the store open, with `CACHE_BYTES` of rows at most. Where the
store is out of reach, as on a node that only prepares, a process finds that out once: S3 is patient, and takes minutes to say so.
"""

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from core.adapters.layout import Encoding
from core.store.errors import StoreError
from core.store.store import Store

log = logging.getLogger(__name__)

CACHE_BYTES = 2**26

_out_of_reach = set[str]()
"""The stores that this process has asked in vain."""


class KnownContents(NamedTuple):
    """What to look for, in which store."""

    store_url: str
    method: str
    encoding: Encoding

    @classmethod
    def of(cls, store: Store, method: str, encoding: Encoding) -> "KnownContents | None":
        """None where the method has written nothing there, so that there is nothing to look for."""
        return cls(store.url, method, encoding) if _of_method(store, method) else None

    def among(self, contents: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
        """Those of (tenant, content hash) that probably need not be read; none where the store is out of reach, or once was."""
        if self.store_url in _out_of_reach:
            return set()
        try:
            store = opened(self.store_url)
            store.refresh()
            wanted, found = _of_method(store, self.method), store.find_adapters_of(contents)
        except (StoreError, OSError) as error:
            log.warning("documents are read whether or not they are in %s: %s", self.store_url, error)
            _out_of_reach.add(self.store_url)
            return set()
        return {
            content
            for content, adapters in found.items()
            if wanted <= {row.producer_fingerprint for row in adapters if row.encoding == self.encoding}
        }


@lru_cache(maxsize=1)
def opened(store_url: str) -> Store:
    """A store, opened once in each process that prepares rows."""
    return Store.open(store_url, cache_bytes=CACHE_BYTES)


def _of_method(store: Store, method: str) -> set[str]:
    return {fingerprint for fingerprint, producer in store.producers().items() if producer.method == method}
