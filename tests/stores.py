"""A tiny spec, producer and store for the store's tests."""

from pathlib import Path

import torch

from core.adapters.spec import AdapterSpec, SiteShape
from core.store.manifest import NewAdapter, Producer
from core.store.store import Store
from core.text.documents import Document, Window

SPEC = AdapterSpec(((SiteShape("q", 4, 6), SiteShape("down", 6, 4)),) * 2, rank=2)
PRODUCER = Producer(method="shine", weights="w" * 64, config={"base": "tiny", "quantised": None, "sizes": [1, 2.5]})


def document(text: str = "text", tenant: str = "tenant", collection: str = "c", name: str = "name", title: str = "") -> Document:
    return Document(tenant=tenant, collection=collection, name=name, title=title, text=text)


def vector(seed: int = 0) -> torch.Tensor:
    return torch.randn(SPEC.numel, generator=torch.Generator().manual_seed(seed))


def adapter(of: Document, seed: int = 0, **changes: object) -> NewAdapter:
    values = {"window": Window(0, 3), "producer": PRODUCER, "spec": SPEC, "encoding": "fp32", "vector": vector(seed), "tokens": 3}
    return NewAdapter(**{"tenant": of.tenant, "content_hash": of.content_hash, **values, **changes})


def store_with_one(path: Path) -> tuple[Store, Document]:
    store, one = Store.open(path, create=True), document("Its own text.", title="Title")
    store.put([one], [adapter(one)])
    return store, one


def the_file(path: Path, pattern: str) -> Path:
    return max(path.glob(pattern))


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
