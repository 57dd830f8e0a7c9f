"""Documents that are nearly the same: found while a corpus is converted, reported, and left as they are.

In: `sketch`es of texts, taken where they are read, and the receipts that carry them. Out: groups of documents, of which any two
neighbours share most of their runs of `WORDS` words. Documents of equal content count once: they share an adapter anyway.

MinHash with locality-sensitive hashing (Broder 1997; Leskovec et al., Mining of Massive Datasets, 3.4): `BANDS` bands of
`BAND_ROWS` values; two texts whose word runs have Jaccard similarity s meet in one band at least with probability
about 1 - (1 - s^12)^10: 0.96 at 0.9, 0.51 at 0.8, 0.002 at 0.5. Nothing is compared again: a group says likely, not certain.

Cost: 10 us for 100 words, in the tasks that read; the driver holds 88 bytes a document, and groups a million in some seconds.
"""

from array import array
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from rensa import RMinHash

from pipelines.conversion.receipts import Receipt

WORDS, BANDS, BAND_ROWS = 3, 10, 12
_SEED = 1
_FNV_PRIME = 0x100000001B3


class Groups(NamedTuple):
    """`of[n]` is the group of the n-th document that was added, -1 for none; `sizes[g]` counts the contents of group g, the
    largest group first; `documents` counts those that are in a group."""

    of: "np.ndarray[tuple[int], np.dtype[np.int64]]"
    sizes: list[int]

    @property
    def documents(self) -> int:
        return sum(self.sizes)


def sketch(text: str) -> list[int]:
    """`BANDS` numbers of 63 bits, the same in every process. Case and blanks do not count; texts without a word have none."""
    words = text.lower().split()
    if not words:
        return []
    minhash = RMinHash(num_perm=BANDS * BAND_ROWS, seed=_SEED)
    minhash.update([" ".join(words[start : start + WORDS]) for start in range(max(len(words) - WORDS, 0) + 1)])
    values = np.array(minhash.digest(), np.uint64).reshape(BANDS, BAND_ROWS)
    keys = np.arange(1, BANDS + 1, dtype=np.uint64)
    for row in range(BAND_ROWS):
        keys = (keys ^ values[:, row]) * np.uint64(_FNV_PRIME)
        keys ^= keys >> np.uint64(29)
    return [int(key) for key in keys >> np.uint64(1)]


class NearDuplicates:
    """Gathers sketches, in the order of the documents."""

    def __init__(self) -> None:
        self._contents, self._keys = array("Q"), array("Q")

    def add(self, receipts: Iterable[Receipt]) -> None:
        for receipt in receipts:
            self._contents.append(int(receipt.content_hash[:16], 16) if receipt.sketch and receipt.content_hash else 0)
            self._keys.extend(receipt.sketch or [0] * BANDS)

    def groups(self) -> Groups:
        """Of two documents or more, joined wherever two of them meet in a band."""
        contents = np.frombuffer(self._contents, np.uint64)
        every, first, inverse = np.unique(contents, return_index=True, return_inverse=True)
        keys = np.frombuffer(self._keys, np.uint64).reshape(-1, BANDS)[first]
        labels = np.arange(len(every))
        sketched = np.flatnonzero(every)
        runs = [_runs(keys[sketched, band], sketched) for band in range(BANDS) if len(sketched)]
        while True:
            before = labels.copy()
            for members, starts in runs:
                lowest = np.minimum.reduceat(labels[members], starts) if len(starts) else labels[:0]
                labels[members] = np.repeat(lowest, np.diff(np.append(starts, len(members))))
            if np.array_equal(before, labels):
                break
        roots, sizes = np.unique(labels, return_counts=True)
        order = np.argsort(-sizes, kind="stable")
        order = order[sizes[order] > 1]
        number = np.full(len(every), -1)
        number[roots[order]] = np.arange(len(order))
        return Groups(number[labels][inverse], [int(size) for size in sizes[order]])


def _runs(
    keys: "np.ndarray[tuple[int], np.dtype[np.uint64]]", places: "np.ndarray[tuple[int], np.dtype[np.int64]]"
) -> "tuple[np.ndarray[tuple[int], np.dtype[np.int64]], np.ndarray[tuple[int], np.dtype[np.int64]]]":
    """Of one or more: the places whose key another has too, those of one key together; and where each key begins among them."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    same = ordered[1:] == ordered[:-1]
    shared = np.append(same, False) | np.insert(same, 0, False)
    starts = np.flatnonzero(np.insert(ordered[shared][1:] != ordered[shared][:-1], 0, True)) if shared.any() else order[:0]
    return places[order[shared]], starts
