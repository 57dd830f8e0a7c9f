"""What a server is told: which base, which store, and how it runs. The run part bears no identity."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from core.adapters.spec import Kind
from core.config import RunSection, Section


class ServeRun(RunSection):
    """How a server runs. Sizes are for each replica.

    slots: requests that share a step; max_queued_requests: further ones that wait, beyond them clients are told to come again.
    max_waiting_for_store: requests that wait for what is not in memory, counted apart from those; store_timeout_s: how long each
    may. deadline_s: from a request to the end of its answer. adapter_memory_bytes, prompt_memory_bytes: of adapters, and of texts
    with their tokens, kept in host memory. parallel_loads, parallel_reads: of adapters, and of look-ups as of texts.
    prompt_threads: that make tokens of texts. refresh_s: a change of the store is seen within this time; where the store could
    not be asked for max_stale_s, the server is not ready and answers for no document.
    max_length: prompt and answer of one request in tokens, by default what the base takes. cache_memory_bytes: of keys and values
    of all slots; it bounds max_length, so that no request makes them grow beyond it; by default 80 % of a GPU's memory that is
    free when the base is there, and on the CPU no bound. default_max_tokens: of an answer whose request names no number.
    cors_origins: of the pages that browsers may call the server from, ["*"] for all; none by default. drain_s: what requests
    under way get to end at a stop. demand_write_s: the requests of each document are written into the store so often, and at a
    stop; 0 for never. demand_documents: beyond so many on one day, those that are asked for least are forgotten
    (`core.store.demand`).
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)
    replicas: PositiveInt = 1
    cpus: PositiveFloat = 1.0
    gpus: float = Field(default=0.0, ge=0)
    device: str = "cpu"
    slots: PositiveInt = 16
    max_queued_requests: int = Field(default=64, ge=0)
    max_waiting_for_store: PositiveInt = 256
    store_timeout_s: PositiveFloat = 30.0
    deadline_s: PositiveFloat = 600.0
    adapter_memory_bytes: PositiveInt = 2**30
    prompt_memory_bytes: int = Field(default=2**26, ge=0)
    parallel_loads: PositiveInt = 4
    parallel_reads: PositiveInt = 8
    prompt_threads: PositiveInt = 2
    refresh_s: PositiveFloat = 1.0
    max_stale_s: PositiveFloat = 300.0
    max_length: PositiveInt | None = None
    cache_memory_bytes: PositiveInt | None = None
    prefill_tokens_per_step: PositiveInt = 512
    default_max_tokens: PositiveInt = 512
    max_body_bytes: PositiveInt = 2**21
    cors_origins: tuple[str, ...] = ()
    drain_s: float = Field(default=10.0, ge=0)
    demand_write_s: float = Field(default=60.0, ge=0)
    demand_documents: int = Field(default=50_000, ge=2)

    @model_validator(mode="after")
    def _refreshed_in_time(self) -> "ServeRun":
        if self.max_stale_s < 2 * self.refresh_s:
            raise ValueError(f"max_stale_s is {self.max_stale_s}: give twice refresh_s ({self.refresh_s}) or more")
        return self


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
