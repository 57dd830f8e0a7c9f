"""Model names to what answers for them, from the store's newest version.

A name is `base`, `base:document` in the collection that the server calls its own, or `base:collection/document` in another one;
`base` is the name under which the base is served, and collection and document are percent-encoded (all but letters, digits and
`-._~`), so that a name may hold anything. In: such a name. Out: a `Resolution`: the base alone, an adapter, or the stored text
to be shown in the context.

An adapter answers only if it was made for the document's present content and for this base (its producer's `config["base"]` is
the base's fingerprint), and if the engine can run it: its kind, its sites, its rank. Which of those answers is
`core.store.answering`'s rule. One that was found unusable when it was loaded (`refuse`) is passed over from then on, so that an
earlier one answers, or the text in context, and nobody loads it again. A document that no adapter answers for answers in context.

Knows nothing of tensors and HTTP, nor of event loops: `serve.access` is what requests go through. Cost: two look-ups in the
store, which may read storage (`core.store.part_reader`).
"""

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import JsonValue

from core.adapters.spec import AdapterSpec
from core.store.answering import choose
from core.store.index import MAX_PAGE, continue_after
from core.store.manifest import AdapterRow, DocumentRow, Producer
from core.store.store import Store
from core.text.documents import nfc
from serve.schema import Mode, Source

log = logging.getLogger(__name__)

MOST_REFUSED = 10_000


class UnknownModel(ValueError):
    """No document, and no base, of that name."""


class BadPage(ValueError):
    """A page of models that cannot be: `param` says what is wrong."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class ModeImpossible(ValueError):
    """A model that cannot answer in the mode that was asked for."""


@dataclass(frozen=True)
class Resolution:
    """What answers for a model name, as of one version of the store.

    reason: why a document has no adapter. truncated: whether the document was too long to be shown whole.
    """

    model: str
    source: Source
    document: DocumentRow | None = None
    adapter: AdapterRow | None = None
    reason: str | None = None
    truncated: bool = False

    @property
    def shown(self) -> DocumentRow | None:
        """The document whose text stands in the prompt."""
        return self.document if self.source in ("in_context", "adapter_in_context") else None

    def in_mode(self, mode: Mode) -> "Resolution":
        """What answers where a client asks for a mode; `ModeImpossible`, saying what is, where that cannot be."""
        if mode == "auto":
            return self
        if self.document is None:
            raise ModeImpossible(f"{self.model} is the base, which has no document: ask a document's model, or in mode auto")
        if mode == "in_context":
            return replace(self, source=mode, adapter=None)
        if self.adapter is None:
            raise ModeImpossible(f"{self.model} has no adapter to answer by ({self.reason}): ask in mode in_context or auto")
        return replace(self, source=mode)

    def to_json(self) -> dict[str, JsonValue]:
        """For clients: where the answer comes from, by ids and hashes."""
        values: dict[str, JsonValue] = {"source": self.source}
        if self.document is not None:
            values |= {
                "collection": self.document.collection,
                "document": self.document.name,
                "content_hash": self.document.content_hash,
            }
        if self.adapter is not None:
            values |= {"adapter": self.adapter.adapter_id, "blob": self.adapter.blob_hash}
        if self.reason is not None:
            values["reason"] = self.reason
        if self.truncated:
            values["truncated"] = True
        return values


class Listing(NamedTuple):
    """A page of models in the order of the store, the base first."""

    models: list[Resolution]
    has_more: bool


class Resolver:
    """The models of one tenant. collection: the one whose documents need no collection in their model name.

    base_fingerprint: of the base that is served. producer: fingerprint of the only producer whose adapters may answer; None for
    any that was made for this base.
    """

    def __init__(
        self, store: Store, tenant: str, collection: str, base: str, base_fingerprint: str, producer: str | None = None
    ) -> None:
        self._store = store
        self._tenant = tenant
        self._collection = collection
        self._base = base
        self._base_fingerprint = base_fingerprint
        self._producer = producer
        self.spec: AdapterSpec | None = None
        """What the engine runs; None for all that fits the base."""
        self._refused: dict[tuple[str, str], str] = {}
        if store.producers() and not self._fitting():
            log.warning("no producer in %s made adapters for this base: its documents answer in context", store.url)

    @property
    def base(self) -> str:
        return self._base

    @property
    def sequence(self) -> int:
        """The version of the store that answers."""
        return self._store.sequence

    def refresh(self) -> None:
        """Goes to the store's newest version; errors as of `Store.refresh`."""
        self._store.refresh()

    def resolve(self, model: str) -> Resolution:
        """What answers for `model`; `UnknownModel`, saying how to list them, where there is no such document."""
        if model == self._base:
            return Resolution(model, "base")
        place = self._place(model)
        document = None if place is None else self._store.find_document(self._tenant, *place)
        if document is None:
            raise UnknownModel(
                f"there is no model {model[:200]!r}: GET /v1/models lists all (prefix=... those whose document begins so); a "
                f"document is {self._base}:NAME or {self._base}:COLLECTION/NAME, both percent-encoded"
            )
        return self._of_documents([document], self._fitting())[0]

    def resolve_many(self, models: Iterable[str]) -> dict[str, Resolution]:
        """What answers for each of many documents' models, in two passes over the store; those that are gone are left out."""
        places = {model: (nfc(self._tenant), *place) for model in models if (place := self._place(model)) is not None}
        rows = self._store.find_documents(sorted(set(places.values())))
        found = dict(zip(rows, self._of_documents(list(rows.values()), self._fitting()), strict=True))
        return {model: found[place] for model, place in places.items() if place in found}

    def list_models(self, after: str | None = None, limit: int = 100, prefix: str = "") -> Listing:
        """The models behind `after` (a model's name), at most `limit` (1 to 1000), of documents whose names begin with `prefix`.

        The base stands first, unless a prefix asks for documents. Raises `BadPage`, and as `resolve` does.
        """
        if not 1 <= limit <= MAX_PAGE:
            raise BadPage("limit", f"limit is {limit}: give 1 to {MAX_PAGE}")
        models = [Resolution(self._base, "base")] if after is None and not prefix else []
        place = None if after in (None, self._base) else self._place(after or "")
        if place is None and after not in (None, self._base):
            raise BadPage("after", f"after is {(after or '')[:200]!r}: give the id of a model, as a listing shows it")
        token = None if place is None else continue_after(*place)
        page = self._store.list_documents(self._tenant, None, prefix, token, limit)
        models += self._of_documents(page.rows, self._fitting())
        return Listing(models[:limit], page.next_token is not None or len(models) > limit)

    def spec_fingerprints(self) -> set[str]:
        """The specs of the tenant's adapters for this base. Passes over their rows: some seconds a million."""
        wanted = {producer for producer in self._fitting() if self._producer in (None, producer)}
        fitting, found = pa.array(sorted(wanted), pa.string()), set[str]()
        for table in self._store.tables("adapters", self._tenant):
            rows = table.filter(pc.is_in(table["producer_fingerprint"], fitting))
            found.update(pc.unique(rows["spec_fingerprint"]).to_pylist())
        return found

    def text(self, document: DocumentRow) -> str:
        """The stored text, checked; reads the storage. Errors as of `Store.get_text`."""
        return self._store.get_text(document)

    def model_name(self, collection: str, name: str) -> str:
        """The model name of a document."""
        encoded = quote(name, safe="")
        if collection != self._collection:
            dots = encoded.strip(".") == ""  # in a URL such a segment would be taken for a step, and vanish
            encoded = f"{quote(collection, safe='')}/{encoded.replace('.', '%2E') if dots else encoded}"
        return f"{self._base}:{encoded}"

    def _place(self, model: str) -> tuple[str, str] | None:
        """(collection, document) that a model name speaks of; None where it is none."""
        if not model.startswith(f"{self._base}:"):
            return None
        parts = model.removeprefix(f"{self._base}:").split("/")
        try:
            names = [nfc(unquote(part, errors="strict")) for part in parts]
        except UnicodeDecodeError:
            return None
        match names:
            case [name]:
                return self._collection, name
            case [collection, name]:
                return collection, name
        return None

    def _of_documents(self, documents: Sequence[DocumentRow], fitting: Collection[str]) -> list[Resolution]:
        contents = [(self._tenant, document.content_hash) for document in documents]
        adapters = self._store.find_adapters_of(contents)
        return [
            self._of_document(document, adapters.get(content, []), fitting)
            for document, content in zip(documents, contents, strict=True)
        ]

    def _of_document(self, document: DocumentRow, adapters: Iterable[AdapterRow], fitting: Collection[str]) -> Resolution:
        model = self.model_name(document.collection, document.name)
        able: list[AdapterRow] = []
        unable: list[str] = []
        for row in adapters:
            if row.producer_fingerprint in fitting and self._producer in (None, row.producer_fingerprint):
                why = self._refused.get((row.adapter_id, row.blob_hash)) or self._cannot_run(row.spec_fingerprint)
                if why is None:
                    able.append(row)
                else:
                    unable.append(why)
        chosen = choose(able)
        if chosen.row is not None:
            return Resolution(model, "adapter", document, chosen.row)
        return Resolution(model, "in_context", document, reason=chosen.reason if able or not unable else unable[0])

    def refuse(self, row: AdapterRow, why: str) -> None:
        """From now on these bytes do not answer, and `why` is what a client is told instead."""
        if len(self._refused) >= MOST_REFUSED:
            del self._refused[next(iter(self._refused))]
        self._refused[row.adapter_id, row.blob_hash] = why

    def _cannot_run(self, spec_fingerprint: str) -> str | None:
        """Why the engine does not run adapters of a spec; None where it does."""
        if self.spec is None:
            return None
        spec = self._store.spec(spec_fingerprint)
        if spec.kind_name != self.spec.kind_name:
            return f"its adapter is a {spec.kind_name}, and this server runs {self.spec.kind_name}"
        if not self.spec.has_sites_of(spec):
            return "its adapter changes sites that this server does not run"
        if spec.rank > self.spec.rank:
            return f"its adapter has rank {spec.rank}, and this server was started for rank {self.spec.rank} (max_rank)"
        return None

    def _fitting(self) -> set[str]:
        """Fingerprints of the producers whose adapters are for this base."""
        return {fingerprint for fingerprint, producer in self._store.producers().items() if self._is_for_base(producer)}

    def _is_for_base(self, producer: Producer) -> bool:
        return producer.config.get("base") == self._base_fingerprint
