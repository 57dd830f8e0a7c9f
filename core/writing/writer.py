"""Documents to checked adapters: what conversion and on-demand generation both call.

In: `Document`s, and their `Tokens` where the caller has them. Out: for each document its adapters, encoded, or the reason
why there are none; one document's failure never touches another's. Knows nothing of stores or workers. `AdapterWriter` is what
every method fulfils: SHINE's is `core.shine.writer`, LIFT's `core.lift.writer`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from transformers import PreTrainedTokenizerBase

from core.adapters.codec import decode
from core.adapters.gated_memory import weights_of
from core.adapters.layout import Encoding
from core.adapters.lora import Composition
from core.adapters.spec import AdapterSpec
from core.adapters.weights import AdapterWeights
from core.config import Section
from core.store.manifest import AdapterRow, NewAdapter, Producer
from core.text.documents import Document, Window, windows, windows_at_borders
from core.text.prompts import Limits
from core.text.tokens import Tokens


class WindowRule(Section):
    """How documents longer than one window are read.

    max_tokens: longest window; None takes what the hypernetwork was trained on (`Hypernetwork.trained_tokens`), `prompts.Limits`
    where that is not known, and no more than the base has positions for. borders: `sentence` ends windows at paragraphs and
    sentences (`core.text.documents.windows_at_borders`), `token` cuts evenly. overlap: tokens that neighbours share, at most
    where windows end at sentences. long_documents: `compose` gives one adapter, `windows` one a window. composition: the mean of
    the windows' deltas or their sum; None takes what the hypernetwork was trained for. A document of more than `max_windows` is
    rejected.
    """

    max_tokens: PositiveInt | None = None
    borders: Literal["sentence", "token"] = "sentence"
    overlap: Annotated[int, Field(ge=0)] = 0
    long_documents: Literal["compose", "windows"] = "compose"
    composition: Composition | None = None
    max_windows: PositiveInt = 64

    @property
    def one_each(self) -> bool:
        """Whether a document has one adapter, for the whole of it, however many its windows."""
        return self.long_documents == "compose"

    def longest(self, positions: int, memory_tokens: int, trained_tokens: int | None) -> int:
        """Tokens of the longest window on such a base. Raises `ValueError` where that or the overlap is too long."""
        room = positions - memory_tokens
        longest = self.max_tokens or min(room, trained_tokens or Limits().context_tokens)
        if not self.overlap < longest <= room:
            raise ValueError(
                f"windows of {longest} tokens with an overlap of {self.overlap} do not fit: the base has {positions} positions, "
                f"{memory_tokens} of them for memory, which leaves {room}; the overlap must be below the window"
            )
        return longest

    def covers(self, tokens: Tokens, max_tokens: int) -> list[Window]:
        """The windows, of at most `max_tokens`, in which a document is read."""
        if self.borders == "token":
            return windows(len(tokens.ids), max_tokens, self.overlap)
        return windows_at_borders(len(tokens.ids), max_tokens, self.overlap, tokens.sentences, tokens.paragraphs)


@dataclass(frozen=True, eq=False)
class Written:
    """A document's adapters in the order of their windows.

    error: what composing or cutting to the spec's rank lost, as `lora.recompress` measures it; 0 where neither was done. lost:
    passages of the document whose questions an endpoint did not write.
    """

    adapters: tuple[NewAdapter, ...]
    error: float = 0.0
    lost: int = 0

    def weights(self) -> AdapterWeights:
        """The adapters as they will be read from the store, one a row, in fp32 on the CPU."""
        spec = self.adapters[0].spec
        return weights_of(spec, torch.stack([decode(new.blob(), spec, new.encoding) for new in self.adapters]))


@dataclass(frozen=True)
class Rejected:
    """Why a document has no adapter. What stands before the first colon is the same for all documents with that fault."""

    reason: str


Outcome = Written | Rejected


class Standing(NamedTuple):
    """The adapter that answers for a document today: its id, and its weights as they are served."""

    adapter_id: str
    weights: AdapterWeights


StandingOf = Callable[[Document], Standing | None]
"""What answers for a document today; None where its text answers in context."""


class AdapterWriter(ABC):
    """A method that writes adapters of one spec in one encoding, as one producer.

    one_each: whether a document has one adapter, for the whole of it.
    """

    producer: Producer
    spec: AdapterSpec
    encoding: Encoding
    tokenizer: PreTrainedTokenizerBase
    one_each: bool = True

    @abstractmethod
    def adapter_ids(self, document: Document, tokens: Tokens) -> list[str]:
        """The ids of what `write` would make of a document, without making it."""

    def finished(self, stored: Iterable[AdapterRow]) -> list[AdapterRow]:
        """Of the stored adapters of one content, those of `adapter_ids`, without its tokens.

        None where they are not all there, nor where documents have several: only tokens tell how many.
        """
        what = self.producer.fingerprint, self.spec.fingerprint, self.encoding
        mine = (row for row in stored if (row.producer_fingerprint, row.spec_fingerprint, row.encoding) == what)
        return list(mine) if self.one_each else []

    @abstractmethod
    def write_each(
        self, documents: Sequence[Document], tokens: Sequence[Tokens] | None = None, standing: StandingOf | None = None
    ) -> Iterator[tuple[int, Outcome]]:
        """(place, outcome) of each document as it is done: no more is held than is in the making.

        standing: says what answers today, for a writer that measures its adapters against that.
        """

    def write(self, documents: Sequence[Document], tokens: Sequence[Tokens] | None = None) -> list[Outcome]:
        """One outcome for each document, in order. tokens: the documents' (`tokens.read`), where the caller has them."""
        outcomes = dict(self.write_each(documents, tokens))
        return [outcomes[place] for place in range(len(documents))]

    def new_adapter(
        self,
        document: Document,
        window: Window,
        vector: bytes,
        error: float | None = None,
    ) -> NewAdapter:
        """The adapter that this writer made for a window of a document; error: what composing or cutting it lost."""
        return NewAdapter(
            tenant=document.tenant,
            content_hash=document.content_hash,
            window=window,
            producer=self.producer,
            spec=self.spec,
            encoding=self.encoding,
            vector=vector,
            tokens=window.end - window.start,
            error=error,
        )

    @abstractmethod
    def settled(self, adapter_ids: Iterable[str]) -> None:
        """Told that these adapters are stored for good: what was kept to go on with them may go."""
