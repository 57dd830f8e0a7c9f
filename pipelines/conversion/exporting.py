"""Stored adapters to PEFT's two files. In: a store, documents' names, a base. Out: directories that PEFT and vLLM read."""

import json
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

from core.adapters.base_model import BaseModel, load_base
from core.adapters.foreign_formats import holds_peft, peft_base_name, write_peft
from core.adapters.lora import LoraWeights
from core.store.answering import choose
from core.store.manifest import AdapterRow
from core.store.store import Store

Lack = Literal["no adapter", "gated memory", "another base", "withheld"]
LACKS: dict[Lack, str] = {
    "no adapter": "no adapter yet: run `imprint convert` on it",
    "gated memory": "a gated memory, which PEFT knows no form of: lift it as a lora or pissa to export",
    "another base": "adapters for another base only: give --base the base that they were made for",
    "withheld": "no LoRA that answers for the whole of it: `imprint store show` says why",
}


def export_peft(
    store_url: str, tenant: str, collection: str, name: str, base: str, out: Path, base_name: str | None = None
) -> None:
    """Writes the LoRA that answers for the document on this base. base_name: as of `core.adapters.foreign_formats.write_peft`.

    Raises `ValueError` where there is no such document, or no such LoRA of it.
    """
    store = Store.open(store_url)
    row = store.find_document(tenant, collection, name)
    if row is None:
        raise ValueError(f"no document {name!r} in collection {collection!r}: names are relative to the converted folder")
    adapters = store.find_adapters(tenant, row.content_hash)
    if not isinstance(found := _answering_lora(store, adapters, None), AdapterRow):
        raise ValueError(f"{name!r} has {LACKS[found]}")
    loaded = load_base(base)
    answering = _answering_lora(store, adapters, _made_for(store, loaded))
    if not isinstance(answering, AdapterRow):
        raise ValueError(f"{name!r} has {LACKS[answering]}")
    _write(store, answering, loaded, out, base_name)


def export_many(
    store_url: str, tenant: str, collection: str | None, prefix: str, base: str, out: Path, base_name: str | None = None
) -> tuple[int, Counter[Lack]]:
    """Writes the LoRA that answers for each document on this base; says how many, and how many documents lack one, by what.

    `out` has a directory for each adapter, by its id, and `documents.jsonl`, which says whose it is: documents of one text share
    one. What is there already is kept, so that an export can go on. Raises `ValueError` where there is nothing to write.
    """
    store, loaded = Store.open(store_url), load_base(base)
    fitting, named = _made_for(store, loaded), peft_base_name(loaded, base_name)
    written, lacks = set[str](), Counter[Lack]()
    out.mkdir(parents=True, exist_ok=True)
    unfinished = out / "documents.jsonl.unfinished"
    with unfinished.open("w") as listing:
        for row, adapters in store.each_document(tenant, collection, prefix):
            answering = _answering_lora(store, adapters, fitting)
            if not isinstance(answering, AdapterRow):
                lacks[answering] += 1
                continue
            directory = out / answering.adapter_id
            if answering.adapter_id not in written and not holds_peft(directory, named):
                _write(store, answering, loaded, directory, base_name)
            written.add(answering.adapter_id)
            names = {"tenant": row.tenant, "collection": row.collection, "name": row.name, "adapter": answering.adapter_id}
            listing.write(json.dumps(names, ensure_ascii=False) + "\n")
    if not written:
        unfinished.unlink()
        found = "; ".join(f"{count:,} have {LACKS[lack]}" for lack, count in lacks.most_common())
        raise ValueError(f"there is nothing to export: {found or f'no such documents of tenant {tenant!r}'}")
    unfinished.rename(out / "documents.jsonl")
    return len(written), lacks


def _made_for(store: Store, base: BaseModel) -> set[str]:
    """The producers whose adapters are for this base."""
    producers = store.producers().items()
    return {fingerprint for fingerprint, producer in producers if producer.config.get("base") == base.fingerprint}


def _answering_lora(store: Store, adapters: Sequence[AdapterRow], producers: Collection[str] | None) -> AdapterRow | Lack:
    """Of the LoRAs of these producers (None: of any) the one that a server answers by; what is lacking where there is none."""
    loras = [adapter for adapter in adapters if store.spec(adapter.spec_fingerprint).kind == "lora"]
    fitting = [adapter for adapter in loras if producers is None or adapter.producer_fingerprint in producers]
    if not fitting:
        return "another base" if loras else "gated memory" if adapters else "no adapter"
    return choose(fitting).row or "withheld"


def _write(store: Store, adapter: AdapterRow, base: BaseModel, out: Path, base_name: str | None) -> None:
    weights = LoraWeights(store.spec(adapter.spec_fingerprint), store.get_vector(adapter)[None])
    write_peft(out, base, weights, base_name)
