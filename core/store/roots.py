"""The versions of a store: roots, how the newest is found, and how the next is made.

    roots/<20 digits>.json    version n: its parts, what their rows add up to, and the producers and specs that rows name
    roots/newest              a hint: the sequence of a root that was the newest one lately

A root that was erased keeps its name for a while, so that no slow writer takes it for the next one.

In and out: `Root`s. A root is canonical JSON that carries its own checksum and a random commit id; it is created once and never
edited. Versions count up by one, and whoever collects roots begins with the oldest. Knows nothing of what lies in parts.

Cost: opening reads the hint, lists what comes after it and reads one root; asking for a newer version is two look-ups. A root
takes about 350 bytes a part and 250 a site of each spec: 100 kB for 10 million documents with their adapters.
"""

import json
import re
import uuid
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from itertools import pairwise
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from core.adapters.spec import AdapterSpec
from core.config import digest, faults
from core.store.errors import CorruptObject, MissingObject, StoreError
from core.store.manifest import AdapterRow, PartKind, Producer, Row
from core.store.objects import Objects

FORMAT_VERSION = 4
FOLDER = "roots"
_HINT = f"{FOLDER}/newest"
_HINT_EVERY = 16
_NAME = re.compile(r"([0-9]{20})\.json")
_SEQUENCE = re.compile(rb"[0-9]{20}")
_ERASED = b"erased"

_Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Part(_Frozen):
    """A manifest part as its root lists it (`core.store.parts`).

    level: parts of level 0 overlap; those of one kind in any other level do not. bytes: of the object, of which the last
    `footer_bytes` are the footer that `checksum` is for. first, last: its lowest and highest key. sequence: the version
    since which its oldest row holds. deleted: its tombstones.
    """

    name: str = Field(pattern=r"^[0-9a-f]{32}\.parquet$")
    kind: PartKind
    level: int = Field(ge=0, le=8)
    rows: int = Field(ge=1, le=2**20)
    deleted: _Count
    bytes: int = Field(ge=1, le=2**30)
    footer_bytes: int = Field(ge=8, le=2**26)
    checksum: str = Field(pattern=r"^[0-9a-f]{64}$")
    first: str
    last: str
    sequence: _Count

    @model_validator(mode="after")
    def _sound(self) -> "Part":
        if self.first > self.last or self.footer_bytes > self.bytes or self.deleted > self.rows:
            raise ValueError(f"part {self.name} contradicts itself")
        return self

    @property
    def object_name(self) -> str:
        return f"manifest/{self.name}"

    def covers(self, key: str) -> bool:
        return self.first <= key <= self.last

    def overlaps(self, other: "Part") -> bool:
        return self.first <= other.last and other.first <= self.last


class Totals(_Frozen):
    """What the live rows of a version add up to. Bytes are those of blobs."""

    documents: _Count = 0
    text_bytes: _Count = 0
    adapters: _Count = 0
    adapter_bytes: _Count = 0

    def plus(self, rows: Iterable[Row], gone: Iterable[Row] = ()) -> "Totals":
        """With live rows added, and others taken away."""
        sums = self.model_dump()
        for sign, changed in ((1, rows), (-1, gone)):
            for row in changed:
                count, size = ("adapters", "adapter_bytes") if isinstance(row, AdapterRow) else ("documents", "text_bytes")
                sums[count] += sign
                sums[size] += sign * row.length
        return Totals(**sums)


class Root(_Frozen):
    """One version of a store. Sequences count up from 1; 0 is a store before its first version."""

    format_version: int = FORMAT_VERSION
    sequence: int = Field(default=0, ge=0, lt=10**20)
    commit_id: str = Field(default="0" * 32, pattern=r"^[0-9a-f]{32}$")
    created: datetime = Field(default_factory=lambda: datetime.now(UTC))
    totals: Totals = Totals()
    parts: tuple[Part, ...] = ()
    producers: dict[str, Producer] = {}
    specs: dict[str, dict[str, JsonValue]] = {}
    checksum: str = ""

    @property
    def name(self) -> str:
        return root_name(self.sequence)

    def next(
        self,
        parts: Sequence[Part],
        totals: Totals | None = None,
        producers: dict[str, Producer] | None = None,
        specs: dict[str, AdapterSpec] | None = None,
    ) -> "Root":
        """The version after this one: with these parts (and totals, where they change), these producers and specs added."""
        return Root(
            sequence=self.sequence + 1,
            commit_id=uuid.uuid4().hex,
            totals=totals or self.totals,
            parts=tuple(parts),
            producers=self.producers | (producers or {}),
            specs=self.specs | {fingerprint: spec.to_json() for fingerprint, spec in (specs or {}).items()},
        )

    def to_bytes(self) -> bytes:
        """Canonical JSON that carries the checksum of its own other fields."""
        values = self.model_dump(mode="json", exclude={"checksum"})
        return json.dumps(values | {"checksum": digest(values)}, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> "Root":
        """Reads what `to_bytes` wrote, byte by byte; else `CorruptObject`, or `StoreError` for another format version."""
        try:
            version = _Versioned.model_validate_json(data).format_version
            if version != FORMAT_VERSION:
                raise StoreError(
                    f"{name} has format version {version}, and this Imprint reads version {FORMAT_VERSION}: "
                    f"open the store with an Imprint that reads format version {version}"
                )
            root = cls.model_validate_json(data)
        except ValidationError as error:
            raise CorruptObject(f"{name} is not a root of a store: {faults(error)[0][:500]}") from None
        if root.to_bytes() != data:
            raise CorruptObject(f"{name} is damaged: its checksum does not hold")
        for fingerprint, producer in root.producers.items():
            if producer.fingerprint != fingerprint:
                raise CorruptObject(f"{name} names a producer {fingerprint} whose fingerprint is {producer.fingerprint}")
        for run in runs(root.parts):
            if any(one.overlaps(other) for one, other in pairwise(run)):
                raise CorruptObject(f"{name} has parts of level {run[0].level} that overlap")
        return root

    def spec(self, fingerprint: str) -> AdapterSpec:
        """The spec of that fingerprint; `StoreError` where there is none, or another under its name."""
        if fingerprint not in self.specs:
            raise StoreError(f"root {self.sequence} knows no spec {fingerprint}")
        spec = AdapterSpec.from_json(self.specs[fingerprint])
        if spec.fingerprint != fingerprint:
            raise CorruptObject(f"root {self.sequence} names a spec {fingerprint} whose fingerprint is {spec.fingerprint}")
        return spec


class _Versioned(BaseModel):
    format_version: int


def runs(parts: Iterable[Part]) -> list[list[Part]]:
    """The parts as runs that ascend without overlap: those of a kind and a level together, each of level 0 alone."""
    together: defaultdict[tuple[str, int], list[Part]] = defaultdict(list)
    found: list[list[Part]] = []
    for part in parts:
        if part.level == 0:
            found.append([part])
        else:
            together[part.kind, part.level].append(part)
    return found + [sorted(run, key=lambda part: part.first) for run in together.values()]


def root_name(sequence: int) -> str:
    return f"{FOLDER}/{sequence:020}.json"


class Roots:
    """The roots of a store."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def newest(self, here: int = 0) -> int | None:
        """The sequence of the newest root; None where there is none. here: a version that was the newest one lately.

        While a root stands, so do all after it: roots are collected from the oldest on.
        """
        if here and self._objects.exists(root_name(here)) and not self._objects.exists(root_name(here + 1)):
            return here
        near = max(here, self._hint())
        return self._last_listed(near) or (self._last_listed(0) if near else None)

    def read(self, sequence: int) -> Root:
        """A version. Raises `MissingObject`, `CorruptObject`, and `StoreError` for another format version."""
        name = root_name(sequence)
        data = self._objects.read(name)
        if data == _ERASED:
            raise MissingObject(f"{name} was erased: documents that it named were removed for good")
        root = Root.from_bytes(data, name)
        if root.sequence != sequence:
            raise CorruptObject(f"{name} is root {root.sequence}: it was copied or renamed")
        return root

    def create(self, root: Root) -> bool:
        """Makes a version, unless another writer has made that sequence first; then False.

        An error leaves open whether it was made, unless it could be read back.
        """
        try:
            made = self._objects.create(root.name, root.to_bytes()) or self._stands(root)
        except OSError:
            made = False
            with suppress(OSError, StoreError):
                made = self._stands(root)
            if not made:
                raise
        if made and (root.sequence == 1 or root.sequence % _HINT_EVERY == 0):
            with suppress(OSError):
                self._objects.replace(_HINT, f"{root.sequence:020}".encode())
        return made

    def standing(self) -> list[tuple[int, datetime]]:
        """The sequences of all roots, erased ones too, and when each was written by the storage's clock; the oldest first."""
        found = ((_NAME.fullmatch(each.name), each.modified) for each in self._objects.listing(FOLDER))
        return [(int(match[1]), modified) for match, modified in found if match]

    def erase(self, sequence: int) -> None:
        """Takes away what a root says, but not its name. A bucket that keeps versions keeps its bytes."""
        self._objects.replace(root_name(sequence), _ERASED)

    def remove(self, sequence: int) -> None:
        """Takes a root away for good; whoever calls begins with the oldest."""
        self._objects.erase(root_name(sequence))

    def _stands(self, root: Root) -> bool:
        try:
            return self.read(root.sequence).commit_id == root.commit_id
        except MissingObject:
            return False

    def _hint(self) -> int:
        """0 where there is none that makes sense."""
        try:
            data = self._objects.read(_HINT)
        except MissingObject:
            return 0
        return int(data) if _SEQUENCE.fullmatch(data) else 0

    def _last_listed(self, after: int) -> int | None:
        """The highest sequence, from `after` on."""
        last = None
        for name in self._objects.names(FOLDER, f"{after - 1:020}.json" if after else ""):
            if match := _NAME.fullmatch(name):
                last = int(match[1])
        return last
