"""What a server is told: which base, which store, and how it runs. The run part bears no identity."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from core.adapters.spec import Kind
from core.config import RunSection, Section


class ServeRun(RunSection):
    """How a server runs. Sizes are for each replica.

    slots: requests that share a step; max_queued_requests: further ones that wait, beyond them clients are told to come again.
    adapter_memory_bytes: of adapters kept in host memory. refresh_s: a change of the store is seen within this time.
    max_length: prompt and answer of one request in tokens, by default what the base takes. default_max_tokens: of an answer whose
    request names no number. drain_s: what requests under way get to end at a stop. demand_write_s: the requests of each document
    are written into the store so often, and at a stop; 0 for never. demand_documents: beyond so many on one day, those that are
    asked for least are forgotten (`core.store.demand`).
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    replicas: PositiveInt = 1
    cpus: PositiveFloat = 1.0
    gpus: float = Field(default=0.0, ge=0)
    device: str = "cpu"
    slots: PositiveInt = 16
    max_queued_requests: int = Field(default=64, ge=0)
    adapter_memory_bytes: PositiveInt = 2**30
    parallel_loads: PositiveInt = 4
    refresh_s: PositiveFloat = 1.0
    max_length: PositiveInt | None = None
    prefill_tokens_per_step: PositiveInt = 512
    default_max_tokens: PositiveInt = 512
    max_body_bytes: PositiveInt = 2**21
    drain_s: float = Field(default=10.0, ge=0)
    demand_write_s: float = Field(default=60.0, ge=0)
    demand_documents: int = Field(default=50_000, ge=2)


class ServeSettings(Section):
    """What is served. base: a directory or a Hugging Face name; store: a path or URL.

    collection: the one whose documents are `served_name:document`. producer: fingerprint of the only producer whose adapters may
    answer, by default the one that wrote last for this base. kind: of the adapters that the engine runs, where the store has
    both; documents that have the other kind alone answer in context. max_rank: of adapters of this kind (of a gated memory the
    width), by default the largest that the store has for this base when the server starts (8 where it has none yet); all take as
    much memory as this rank over all sites, adapters of some sites alone too.
    """

    base: str
    store: str
    tenant: str = "default"
    collection: str = "default"
    served_name: str = Field(default="base", min_length=1)
    dtype: Literal["float32", "bfloat16"] = "float32"
    producer: str | None = None
    kind: Kind = "lora"
    max_rank: PositiveInt | None = None
    run: ServeRun = ServeRun()
