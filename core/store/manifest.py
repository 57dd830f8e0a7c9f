"""What a store says of its contents: producers, adapter ids, and the rows of documents and adapters.

Plain records. Knows nothing of how rows are kept (`core.store.parts`), of versions (`core.store.roots`) or of files.

A row's key names a thing for good; of several rows of one key, the one of the highest sequence holds. A deleted row says that
there is nothing of that key any more: a tombstone, without blob.
"""

import hashlib
import re
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from core.adapters.layout import Encoding, encoded_bytes
from core.adapters.spec import AdapterSpec
from core.config import digest
from core.text.documents import Window, clean_name

if TYPE_CHECKING:
    from torch import Tensor

_HASH = re.compile(r"[0-9a-f]{64}")


Key = tuple[str, str, str]
"""(tenant, collection, name) of a document, (tenant, content hash, adapter id) of an adapter."""


def blob_hash(data: bytes) -> str:
    """BLAKE2b with 32 bytes (hex): names bytes, where an adapter id names a derivation. About 1 GB/s."""
    return hashlib.blake2b(data, digest_size=32).hexdigest()


class Producer(BaseModel):
    """What writes adapters: a method, the weights it uses, and the settings that change what it writes.

    `weights` is the fingerprint of the hypernetwork or starting adapter. `config` holds the base with tokenizer, quantisation and
    chat template, the normaliser and whatever else bears identity; nothing that belongs to one document, for a store keeps its
    producers in the root.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = Field(min_length=1)
    weights: str
    config: dict[str, JsonValue]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of all three."""
        return digest(self.model_dump(mode="json"))

    def __hash__(self) -> int:
        return hash(self.fingerprint)


def adapter_id(tenant: str, content_hash: str, window: Window, producer: Producer, spec: AdapterSpec, encoding: Encoding) -> str:
    """SHA-256 (hex) that names a derivation: whoever knows the parts knows which adapter should answer."""
    return digest(
        {
            "tenant": tenant,
            "content_hash": content_hash,
            "window": list(window),
            "producer": producer.fingerprint,
            "spec": spec.fingerprint,
            "encoding": encoding,
        }
    )


class Location(NamedTuple):
    """Bytes `[offset, offset + length)` of a shard, with their `blob_hash`."""

    shard: str
    offset: int
    length: int
    blob_hash: str


@dataclass(frozen=True, slots=True)
class DocumentRow:
    """A name's content as of version `sequence`."""

    tenant: str
    collection: str
    name: str
    title: str
    content_hash: str
    shard: str
    offset: int
    length: int
    blob_hash: str
    sequence: int
    created: datetime
    deleted: bool = False

    @property
    def key(self) -> Key:
        return self.tenant, self.collection, self.name


@dataclass(frozen=True, slots=True)
class AdapterRow:
    """An adapter for the tokens of a window of some content; what was not measured is None, an absent `parent` too.

    quality: share of `questions` on its document that it answers as it will be served; readable: that the base answers with the
    passage before it; standing_quality: that what answered before does, which `standing` names (an adapter's id, or
    `answering.IN_CONTEXT`); quality_lost: what cutting it to the serving rank took (`core.writing.question_gate`). error:
    relative error of the cut, or of composing windows, as `core.adapters.lora.recompress` measures it. matched_loss,
    shuffled_loss, base_loss: nats a token of the document's own text, under this adapter, another document's and none
    (`core.writing.quality_gate`). withheld: whether it must not answer, for it did not pass its gate; `answering.why_withheld`
    says why. sequence: the version since which the row holds.
    """

    adapter_id: str
    tenant: str
    content_hash: str
    window_start: int
    window_end: int
    producer_fingerprint: str
    spec_fingerprint: str
    encoding: Encoding
    shard: str
    offset: int
    length: int
    blob_hash: str
    tokens: int
    rank: int
    created: datetime
    quality: float | None = None
    quality_lost: float | None = None
    readable: float | None = None
    standing_quality: float | None = None
    error: float | None = None
    matched_loss: float | None = None
    shuffled_loss: float | None = None
    base_loss: float | None = None
    questions: int | None = None
    standing: str | None = None
    withheld: bool | None = None
    parent: str | None = None
    sequence: int = 0
    deleted: bool = False

    @property
    def key(self) -> Key:
        return self.tenant, self.content_hash, self.adapter_id

    @property
    def window(self) -> Window:
        return Window(self.window_start, self.window_end)


@dataclass(frozen=True, eq=False, kw_only=True)
class NewAdapter:
    """An adapter to put: `vector` is flat_N under `spec`, or its bytes in `encoding`."""

    tenant: str
    content_hash: str
    window: Window
    producer: Producer
    spec: AdapterSpec
    encoding: Encoding
    vector: "Tensor | bytes"
    tokens: int
    quality: float | None = None
    quality_lost: float | None = None
    readable: float | None = None
    standing_quality: float | None = None
    error: float | None = None
    matched_loss: float | None = None
    shuffled_loss: float | None = None
    base_loss: float | None = None
    questions: int | None = None
    standing: str | None = None
    withheld: bool | None = None
    parent: str | None = None

    @property
    def adapter_id(self) -> str:
        return adapter_id(self.tenant, self.content_hash, self.window, self.producer, self.spec, self.encoding)

    def row(self, location: Location, created: datetime) -> AdapterRow:
        """Its manifest row, once its blob has a place."""
        return AdapterRow(
            adapter_id=self.adapter_id,
            tenant=self.tenant,
            content_hash=self.content_hash,
            window_start=self.window.start,
            window_end=self.window.end,
            producer_fingerprint=self.producer.fingerprint,
            spec_fingerprint=self.spec.fingerprint,
            encoding=self.encoding,
            **location._asdict(),
            tokens=self.tokens,
            rank=self.spec.rank,
            created=created,
            quality=self.quality,
            quality_lost=self.quality_lost,
            questions=self.questions,
            readable=self.readable,
            standing=self.standing,
            standing_quality=self.standing_quality,
            error=self.error,
            matched_loss=self.matched_loss,
            shuffled_loss=self.shuffled_loss,
            base_loss=self.base_loss,
            withheld=self.withheld,
            parent=self.parent,
        )

    def blob(self) -> bytes:
        """The vector's bytes; raises `ValueError` where tenant, hash, window or vector are not what they should be."""
        if clean_name("tenant", self.tenant) != self.tenant or not _HASH.fullmatch(self.content_hash):
            raise ValueError("an adapter names its tenant and content hash as its document does: take both from the document")
        if not 0 <= self.window.start < self.window.end:
            raise ValueError(f"window {tuple(self.window)} is empty or negative: give the token range that the adapter is for")
        data = self.vector if isinstance(self.vector, bytes) else self._encoded(self.vector)
        if len(data) != (expected := encoded_bytes(self.spec, self.encoding)):
            raise ValueError(f"the vector has {len(data)} bytes, but its spec has {expected} in {self.encoding}")
        return data

    def _encoded(self, vector: "Tensor") -> bytes:
        from core.adapters.codec import encode  # brings torch, which whoever only lists need not wait for

        return encode(vector, self.encoding, self.spec)


Row = DocumentRow | AdapterRow
RowT = TypeVar("RowT", DocumentRow, AdapterRow)
PartKind = Literal["documents", "adapters"]


def tombstone(row: RowT, created: datetime) -> RowT:
    """The row that takes another's place once its thing is deleted; its sequence is for the commit to say."""
    dead = replace(row, shard="", offset=0, length=0, blob_hash="", sequence=0, created=created, deleted=True)
    return replace(dead, title="") if isinstance(dead, DocumentRow) else dead
