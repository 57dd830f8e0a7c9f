"""Collects what no version needs any more: old roots, parts and shards that no root names, uploads that were never finished.

In: a store's objects, a grace period. Out: what was collected, or with `dry_run` what would be. Never the newest version, nor one
that was the newest within the grace period, nor anything that any of these names; never `demand/`, nor what is no object of a
store.

The grace period protects readers, who stay with an older version for a while, and writers, whose shards no root names yet:
an object younger than it is left alone. It is at least `core.store.versions.MIN_GRACE_S`, and a change that takes half as long is
refused when it is committed, so no row ever names a shard that was collected, as long as clocks differ by less than 20 minutes.

Erasure (`core.store.upkeep.erasure`) may be in a hurry: `named_before` takes at once what older roots name and the newest does
not.

Cost: two listings, the roots and parts of the versions that stay, one or two requests for each object that goes.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from core.store.demand import FOLDER as DEMAND
from core.store.errors import MissingObject
from core.store.objects import Listed, Objects
from core.store.roots import FOLDER as ROOTS
from core.store.roots import Part, Root, Roots, root_name
from core.store.shards import FOLDER as SHARDS
from core.store.upkeep.moving import Rewriter
from core.store.upkeep.results import Collected
from core.store.versions import MIN_GRACE_S, Versions

GRACE_S = 86_400
MANIFEST = "manifest"
FOLDERS = (SHARDS, MANIFEST, ROOTS, DEMAND)
_THREADS = 8


class _Standing(NamedTuple):
    """The roots of the versions that stay, and of those that go."""

    kept: list[Root]
    gone: list[Root]
    gone_names: list[int]


def collect(
    objects: Objects,
    versions: Versions,
    grace_s: float = GRACE_S,
    dry_run: bool = False,
    named_before: bool = False,
    now: datetime | None = None,
) -> Collected:
    """Collects, the oldest first; what a call that was killed has left is for the next.

    named_before: also at once what versions before the newest name and that one does not, and what those roots say (their names
    stay for the grace period). now: by the storage's clock. Raises `ValueError` for a grace period below `MIN_GRACE_S`.
    """
    if grace_s < MIN_GRACE_S:
        raise ValueError(f"a grace period of {grace_s:g} s is too short: writers that are at it need {MIN_GRACE_S} s or more")
    before = (now or datetime.now(UTC)) - timedelta(seconds=grace_s)
    versions.refresh()
    roots = _standing(versions, before, named_before)
    rewriter = Rewriter(objects, versions)
    kept = _named(rewriter, roots.kept)
    hurried = _named(rewriter, roots.gone) - kept if named_before else set()
    found = [(f"{folder}/{each.name}", each) for folder in (MANIFEST, SHARDS) for each in objects.listing(folder)]
    orphans = [(name, each) for name, each in found if name not in kept]
    going = [(name, each) for name, each in orphans if each.modified < before or name in hurried]
    collected = Collected(
        [root_name(sequence) for sequence in roots.gone_names],
        [name for name, _ in going if name.startswith(MANIFEST)],
        [name for name, _ in going if name.startswith(SHARDS)],
        sum(each.size for _, each in going),
        0,
        0,
        len(orphans) - len(going),
    )
    if dry_run:
        return collected
    for root in roots.gone if named_before else ():
        versions.roots.erase(root.sequence)
    for sequence in roots.gone_names:
        versions.roots.remove(sequence)
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(objects.erase, [name for name, _ in going]))
    unfinished = objects.remove_unfinished(before)
    return collected._replace(unfinished=unfinished, earlier=sum(objects.erase_earlier(folder) for folder in FOLDERS))


def orphans(objects: Objects, versions: Versions) -> list[tuple[str, Listed]]:
    """The parts and shards that no standing root names, of whatever age."""
    rewriter = Rewriter(objects, versions)
    listed = [(f"{folder}/{each.name}", each) for folder in (MANIFEST, SHARDS) for each in objects.listing(folder)]
    versions.refresh()  # after the listing: what was committed meanwhile is named
    everything = _named(rewriter, _standing(versions, datetime.min.replace(tzinfo=UTC), False).kept)
    return [(name, each) for name, each in listed if name not in everything]


def _standing(versions: Versions, before: datetime, hurry: bool) -> _Standing:
    """gone: with `hurry`, all that are not the newest. gone_names: those that were superseded before that moment."""
    listed = versions.roots.standing()
    superseded = [after < before for _, after in listed[1:]] + [False]
    names = [sequence for (sequence, _), old in zip(listed, superseded, strict=True) if old]
    newest = versions.index.root
    others = [(sequence, old) for (sequence, _), old in zip(listed, superseded, strict=True) if sequence != newest.sequence]
    kept = _read(versions.roots, [sequence for sequence, old in others if not (old or hurry)])
    gone = _read(versions.roots, [sequence for sequence, _ in others if sequence < newest.sequence]) if hurry else []
    return _Standing([*kept, newest], gone, names)


def _read(roots: Roots, sequences: Sequence[int]) -> list[Root]:
    """Those that still say something."""
    read = list[Root]()
    for sequence in sequences:
        with suppress(MissingObject):
            read.append(roots.read(sequence))
    return read


def _named(rewriter: Rewriter, roots: Sequence[Root]) -> set[str]:
    """The parts and shards that versions name, whichever of them are there."""
    parts: dict[str, Part] = {part.name: part for root in roots for part in root.parts}
    shards = rewriter.named(list(parts.values()))
    return {part.object_name for part in parts.values()} | {f"{SHARDS}/{shard}" for shard in shards}
