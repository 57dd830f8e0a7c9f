"""A stored adapter to PEFT's two files. In: a store, a document's name, a base. Out: a directory that PEFT reads."""

from pathlib import Path

from core.base_model import load_base
from core.foreign_formats import write_peft
from core.lora import LoraWeights
from core.store import Store


def export_peft(store_url: str, tenant: str, collection: str, name: str, base: str, out: Path) -> None:
    """Writes the document's newest LoRA. Raises `ValueError` where it has none, or none for this base."""
    store = Store.open(store_url)
    row = store.find_document(tenant, collection, name)
    if row is None:
        raise ValueError(f"no document {name!r} in collection {collection!r}: names are relative to the converted folder")
    adapters = store.find_adapters(tenant, row.content_hash)
    if not adapters:
        raise ValueError(f"{name!r} has no adapter yet: run `imprint convert` on it")
    loras = [adapter for adapter in adapters if store.spec(adapter.spec_fingerprint).kind == "lora"]
    if not loras:
        raise ValueError(f"{name!r} has a gated memory, which PEFT knows no form of: lift it as a lora or pissa to export")
    newest = max(loras, key=lambda adapter: (adapter.created, adapter.adapter_id))
    write_peft(out, load_base(base), LoraWeights(store.spec(newest.spec_fingerprint), store.get_vector(newest)[None]))
