"""Any PEFT LoRA into a store, as the adapter of a document. In: PEFT's two files, a base, a name. Out: what was put.

The adapter is kept exactly: in bf16 where its files are, else in fp32. Its producer says that it was imported and which weights
these are, so that another adapter under the same name is a new one and answers from then on. Each import adds a producer to the
store's root, about 300 bytes.

Without a text of its own, a name that the store does not have yet gets a sentence that says so: such a document answers from its
adapter, and has nothing to answer from in context.
"""

from pathlib import Path
from typing import NamedTuple

import torch

from core.adapters.base_model import BaseModel, load_base, tokenizer_of
from core.adapters.deltas import changes_anything
from core.adapters.foreign_formats import check_peft_base, read_peft
from core.adapters.identity import hash_tensors
from core.adapters.layout import Encoding
from core.adapters.lora import LoraWeights
from core.store.manifest import AdapterRow, DocumentRow, NewAdapter, Producer
from core.store.store import Store
from core.text.documents import Document, Window
from core.text.tokens import read


class Imported(NamedTuple):
    """The rows that hold now. had_adapter: the store had this very adapter for this text before."""

    document: DocumentRow
    adapter: AdapterRow
    had_adapter: bool


def import_peft(
    directory: Path,
    store_url: str,
    name: str,
    base: str,
    text: Path | None = None,
    tenant: str = "default",
    collection: str = "default",
    base_name: str | None = None,
) -> Imported:
    """Puts the adapter in `directory` into a store, which is made where there is none, for the document `name`.

    text: a file with the document's text; else it is the text that the store has under this name, if any. base_name: what the
    adapter's config calls the base, if not `base`. Raises `ValueError` for an adapter that is not a plain LoRA for this base,
    changes nothing or is not finite; then nothing was put.
    """
    loaded = load_base(base)
    check_peft_base(directory, loaded, base_name or base)
    weights = read_peft(directory, loaded)
    if not changes_anything(weights):
        raise ValueError(f"{directory} changes nothing: its B is zero everywhere, as before training")
    own = None if text is None else Document(tenant=tenant, collection=collection, name=name, text=_text(text))
    encoding: Encoding = "bf16" if weights.flat_BN.dtype == torch.bfloat16 else "fp32"
    producer = _producer(weights, loaded)
    store = Store.open(store_url, create=True)
    row = None if own is not None else store.find_document(tenant, collection, name)
    if row is not None:
        documents, content, whole = [], row.content_hash, store.get_text(row)
    else:
        own = own or Document(tenant=tenant, collection=collection, name=name, text=_sentence(name, producer))
        documents, content, whole = [own], own.content_hash, own.text
        tenant = own.tenant
    tokens = len(read(tokenizer_of(loaded), whole).ids)
    new = NewAdapter(
        tenant=tenant if row is None else row.tenant,
        content_hash=content,
        window=Window(0, tokens),
        producer=producer,
        spec=weights.spec,
        encoding=encoding,
        vector=weights.flat_BN[0],
        tokens=tokens,
    )
    put = store.put(documents, [new])
    return Imported(row or put.documents[0], put.adapters[0], put.new_adapters == 0)


def _producer(weights: LoraWeights, base: BaseModel) -> Producer:
    return Producer(
        method="peft",
        weights=hash_tensors([("flat_BN", weights.flat_BN)]),
        config={"base": base.fingerprint},
    )


def _sentence(name: str, producer: Producer) -> str:
    return f"{name}: an imported LoRA adapter, {producer.weights[:12]}, without a text of its own."


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"no text at {file}: give a file of plain text") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 at byte {error.start}: save it as plain text in UTF-8") from None
