"""Stored adapters to PEFT's two files. In: a store, documents' names, a base. Out: directories that PEFT reads."""

import json
from pathlib import Path

from core.adapters.base_model import BaseModel, load_base
from core.adapters.foreign_formats import write_peft
from core.adapters.lora import LoraWeights
from core.store.manifest import AdapterRow
from core.store.store import Store


def export_peft(store_url: str, tenant: str, collection: str, name: str, base: str, out: Path) -> None:
    """Writes the document's newest LoRA. Raises `ValueError` where it has none, or none for this base."""
    store = Store.open(store_url)
    row = store.find_document(tenant, collection, name)
    if row is None:
        raise ValueError(f"no document {name!r} in collection {collection!r}: names are relative to the converted folder")
    adapters = store.find_adapters(tenant, row.content_hash)
    if not adapters:
        raise ValueError(f"{name!r} has no adapter yet: run `imprint convert` on it")
    newest = _newest_lora(store, adapters)
    if newest is None:
        raise ValueError(f"{name!r} has a gated memory, which PEFT knows no form of: lift it as a lora or pissa to export")
    _write(store, newest, load_base(base), out)


def export_many(store_url: str, tenant: str, collection: str | None, prefix: str, base: str, out: Path) -> tuple[int, int]:
    """Writes the newest LoRA of each document; says how many, and how many documents have none.

    `out` has a directory for each adapter, by its id, and `documents.jsonl`, which says whose it is: documents of one text share
    one. What is there already is kept, so that an export can go on. Raises `ValueError` for an adapter that is not for this base.
    """
    store, loaded = Store.open(store_url), load_base(base)
    out.mkdir(parents=True, exist_ok=True)
    written, skipped = set[str](), 0
    with (out / "documents.jsonl").open("w") as listing:
        for row, adapters in store.each_document(tenant, collection, prefix):
            newest = _newest_lora(store, adapters)
            if newest is None:
                skipped += 1
                continue
            directory = out / newest.adapter_id
            if not (directory / "adapter_model.safetensors").exists():
                _write(store, newest, loaded, directory)
            written.add(newest.adapter_id)
            names = {"tenant": row.tenant, "collection": row.collection, "name": row.name, "adapter": newest.adapter_id}
            listing.write(json.dumps(names, ensure_ascii=False) + "\n")
    return len(written), skipped


def _newest_lora(store: Store, adapters: list[AdapterRow]) -> AdapterRow | None:
    loras = [adapter for adapter in adapters if store.spec(adapter.spec_fingerprint).kind == "lora"]
    return max(loras, key=lambda adapter: (adapter.created, adapter.adapter_id), default=None)


def _write(store: Store, adapter: AdapterRow, base: BaseModel, out: Path) -> None:
    write_peft(out, base, LoraWeights(store.spec(adapter.spec_fingerprint), store.get_vector(adapter)[None]))
