"""Documents to checked adapters: what conversion and on-demand generation both call.

In: `Document`s, and their `Tokens` where the caller has them. Out: for each document its adapters, encoded, or the reason
why there are none; one document's failure never touches another's. Knows nothing of stores or workers. `AdapterWriter` is what
every method fulfils; SHINE's stands here, LIFT's in core.lift_writing.

`HypernetworkWriter` reads a document as the hypernetwork was trained to: raw text, no template. A document longer than a window
is read in windows that end at sentences; their adapters become one (ranks concatenated, then cut to the spec's rank by SVD) or
stay one each. Windows of like length share a forward pass, in halves where memory does not hold it; a window that does not fit
alone is its document's rejection. Cost: the hypernetwork's; a composition adds two QR decompositions a linear, and a gate what
`core.quality_gate` says.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from core.adapter import ATTENTION, AdapterSpec, AdapterWeights
from core.base_model import tokenizer_of
from core.codec import Encoding, decode, encode
from core.config import Section
from core.documents import NORMALISER, Document, Window, windows, windows_at_borders
from core.fitting_batches import FittingBatches
from core.gated_memory import weights_of
from core.hypernetwork import Hypernetwork
from core.lora import Composition, LoraWeights, composed
from core.manifest import AdapterRow, NewAdapter, Producer, adapter_id
from core.prompts import Limits
from core.quality_gate import Candidate, GateSettings, QualityGate
from core.tokens import BORDERS, Tokens, read


class WindowRule(Section):
    """How documents longer than one window are read.

    max_tokens: longest window; None takes what the hypernetwork was trained on (`Hypernetwork.trained_tokens`), `prompts.Limits`
    where that is not known, and no more than the base has positions for. borders: `sentence` ends windows at paragraphs and
    sentences (`core.documents.windows_at_borders`), `token` cuts evenly. overlap: tokens that neighbours share, at most where
    windows end at sentences. long_documents: `compose` gives one adapter, `windows` one a window. composition: the
    mean of the windows' deltas or their sum; None takes what the hypernetwork was trained for. A document of more than
    `max_windows` is rejected.
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

_UNUSABLE = "the hypernetwork gave no usable adapter: zero or not finite"
_OUT_OF_MEMORY = "out of memory: a window does not fit alone, lower windows.max_tokens"


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
    def write_each(self, documents: Sequence[Document], tokens: Sequence[Tokens] | None = None) -> Iterator[tuple[int, Outcome]]:
        """(place, outcome) of each document as it is done: no more is held than is in the making."""

    def write(self, documents: Sequence[Document], tokens: Sequence[Tokens] | None = None) -> list[Outcome]:
        """One outcome for each document, in order. tokens: the documents' (`core.tokens.read`), where the caller has them."""
        outcomes = dict(self.write_each(documents, tokens))
        return [outcomes[place] for place in range(len(documents))]

    def new_adapter(
        self,
        document: Document,
        window: Window,
        vector: bytes,
        error: float | None = None,
        quality: float | None = None,
        quality_lost: float | None = None,
    ) -> NewAdapter:
        """The adapter that this writer made for a window of a document, with what was measured on it."""
        return NewAdapter(
            tenant=document.tenant,
            content_hash=document.content_hash,
            window=window,
            producer=self.producer,
            spec=self.spec,
            encoding=self.encoding,
            vector=vector,
            tokens=window.end - window.start,
            quality=quality,
            quality_lost=quality_lost,
            error=error,
        )

    @abstractmethod
    def settled(self, adapter_ids: Iterable[str]) -> None:
        """Told that these adapters are stored for good: what was kept to go on with them may go."""


class HypernetworkWriter(AdapterWriter):
    """Writes adapters with SHINE's hypernetwork, at most `max_rows` windows and `max_padded_tokens` (memory included) at a time.

    The batch limits and the gate are no part of the producer. Raises `ValueError` for a base without tokenizer, for one that
    cannot tell where sentences end, for windows that the base has no positions for, and for a gate without a chat template.
    """

    def __init__(
        self,
        hypernetwork: Hypernetwork,
        encoding: Encoding = "bf16",
        rule: WindowRule | None = None,
        max_rows: int = 16,
        max_padded_tokens: int = 4096,
        gate: GateSettings | None = None,
    ) -> None:
        rule, gate = rule or WindowRule(), gate or GateSettings()
        base = hypernetwork.base
        self.tokenizer = tokenizer_of(base)
        if rule.borders == "sentence" and not self.tokenizer.is_fast:
            raise ValueError(
                f"{type(self.tokenizer).__name__} cannot say where in the text a token ends, so windows cannot end at sentences: "
                "load the fast tokenizer, or choose windows.borders token"
            )
        self._memory_tokens = len(hypernetwork.memory_MH)
        max_tokens = rule.longest(base.max_length, self._memory_tokens, hypernetwork.trained_tokens)
        self._hypernetwork = hypernetwork.eval()
        self.composition: Composition = rule.composition or hypernetwork.settings.composition
        self.rule = rule.model_copy(update={"max_tokens": max_tokens, "composition": self.composition})
        self.one_each = rule.one_each
        self._max_tokens = max_tokens
        self._batches = FittingBatches(max_rows, max_padded_tokens)
        self._gate = QualityGate(base, gate, max_rows, max_padded_tokens) if gate.share else None
        self.encoding: Encoding = encoding
        self.spec = hypernetwork.spec
        self.producer = Producer(
            method="shine",
            weights=hypernetwork.fingerprint(),
            config={
                "base": base.fingerprint,
                "normaliser": NORMALISER,
                "windows": self.rule.model_dump(mode="json", exclude={"max_windows"}),
                "borders": BORDERS if rule.borders == "sentence" else None,
            },
        )

    def adapter_ids(self, document: Document, tokens: Tokens) -> list[str]:
        """See `AdapterWriter.adapter_ids`; one a window, or one in all where windows are composed."""
        covers = self._covers(tokens)
        if self._composes(covers):
            covers = [Window(0, len(tokens.ids))]
        identity = document.tenant, document.content_hash
        return [adapter_id(*identity, window, self.producer, self.spec, self.encoding) for window in covers]

    def write_each(self, documents: Sequence[Document], tokens: Sequence[Tokens] | None = None) -> Iterator[tuple[int, Outcome]]:
        """See `AdapterWriter.write_each`; longest windows first."""
        if tokens is None:
            tokens = [read(self.tokenizer, document.text) for document in documents]
        units: list[tuple[int, Window]] = []
        parts: dict[int, dict[Window, Tensor | str]] = {}
        wanted: dict[int, int] = {}
        for place, each in enumerate(tokens):
            covers = self._covers(each)
            if not covers:
                yield place, Rejected("no tokens")
            elif len(covers) > self.rule.max_windows:
                limit = f"{len(covers)} windows of {self._max_tokens} tokens, {self.rule.max_windows} are allowed"
                yield place, Rejected(f"too long: {limit}; split it, or raise max_windows")
            else:
                wanted[place], parts[place] = len(covers), {}
                units += [(place, window) for window in covers]
        ids = [tokens[place].ids[window.start : window.end] for place, window in units]
        lengths = [len(each) + self._memory_tokens for each in ids]
        for batch, made in self._batches.run(lengths, lambda batch: self._generate([ids[unit] for unit in batch])):
            done: list[tuple[int, Outcome]] = []
            for unit, part in zip(batch, made or [_OUT_OF_MEMORY] * len(batch), strict=True):
                place, window = units[unit]
                parts[place][window] = part.to("cpu", copy=True) if isinstance(part, Tensor) and wanted[place] > 1 else part
                if len(parts[place]) == wanted[place]:
                    done.append((place, self._finish(documents[place], len(tokens[place].ids), parts.pop(place))))
            del made, part  # on a GPU 87 MB a window of an 8B model, which the next batch needs
            yield from done if self._gate is None else self._gated(self._gate, done, tokens)

    def settled(self, adapter_ids: Iterable[str]) -> None:
        """See `AdapterWriter.settled`; nothing was kept."""

    def _covers(self, tokens: Tokens) -> list[Window]:
        return self.rule.covers(tokens, self._max_tokens)

    def _composes(self, covers: Sequence[Window]) -> bool:
        return len(covers) > 1 and self.one_each

    @torch.inference_mode()
    def _generate(self, ids: Sequence[Sequence[int]]) -> list[Tensor | str]:
        """flat_N for each window, or what is wrong with it.

        Over a base in bf16 all matrix products are in bf16, M2P's between its fp32 norms, too: in fp32 it would take most of the
        time. A window that is its whole document stays on the device, where `codec.encode` casts it.
        """
        base, longest = self._hypernetwork.base, max(map(len, ids))
        ids_BT = torch.zeros(len(ids), longest, dtype=torch.int64)
        mask_BT = torch.zeros_like(ids_BT)
        for row, tokens in enumerate(ids):
            ids_BT[row, longest - len(tokens) :] = torch.as_tensor(tokens)
            mask_BT[row, longest - len(tokens) :] = 1
        with torch.autocast(base.device.type, torch.bfloat16, enabled=base.dtype == torch.bfloat16):
            weights = self._hypernetwork.generate(ids_BT.to(base.device), mask_BT.to(base.device))
        norms = delta_norms(weights).tolist()
        return [_UNUSABLE if _fault(norm) else flat_N for flat_N, norm in zip(weights.flat_BN, norms, strict=True)]

    @torch.inference_mode()
    def _finish(self, document: Document, length: int, made: dict[Window, Tensor | str]) -> Outcome:
        """made: what `_generate` gave for each window."""
        covers, parts = sorted(made), {window: part for window, part in made.items() if isinstance(part, Tensor)}
        for window in covers:
            if isinstance(fault := made[window], str):
                return Rejected(f"{fault}, tokens {window.start} to {window.end}")
        error, composes = 0.0, self._composes(covers)
        if composes:
            whole = LoraWeights(self.spec, torch.stack([parts[window] for window in covers]))
            weights, error = composed(whole, self.composition, self.spec.rank)
            if _fault(delta_norms(weights).item()):
                return Rejected("the composed adapter is zero or not finite")
            covers = [Window(0, length)]
            parts = {covers[0]: weights.flat_BN[0]}
        try:
            vectors = [encode(parts[window], self.encoding, self.spec) for window in covers]
        except ValueError as unfit:
            return Rejected(f"the adapter cannot be encoded: {unfit}")
        measured = error if composes else None
        pairs = zip(covers, vectors, strict=True)
        return Written(tuple(self.new_adapter(document, window, vector, measured) for window, vector in pairs), error)

    def _gated(
        self, gate: QualityGate, done: Sequence[tuple[int, Outcome]], tokens: Sequence[Tokens]
    ) -> Iterator[tuple[int, Outcome]]:
        """The outcomes with what the gate measured on their adapters."""
        candidates = []
        for place, outcome in done:
            for new in outcome.adapters if isinstance(outcome, Written) else ():
                covers = self._covers(tokens[place]) if new.window == (0, len(tokens[place].ids)) else [new.window]
                candidates.append(Candidate(new, [tokens[place].ids[window.start : window.end] for window in covers]))
        measured = iter(gate.measured(candidates))
        for place, outcome in done:
            if isinstance(outcome, Written):
                outcome = replace(outcome, adapters=tuple(islice(measured, len(outcome.adapters))))
            yield place, outcome


def delta_norms(weights: LoraWeights) -> Tensor:
    """`[B]` Frobenius norms of the whole deltas (all A B, and C), from R x R products; not finite where a number is not."""
    square_B = weights.flat_BN.new_zeros(len(weights))
    for (layer, site, tensor), value in weights.tensors.items():
        if tensor == "A":
            b_BRO = weights.tensors[layer, site, "B"]
            square_B = square_B + ((value.mT @ value) * (b_BRO @ b_BRO.mT)).sum((1, 2))
        elif tensor == "C":
            square_B = square_B + value.square().sum(1)
    return square_B.sqrt()


def _fault(norm: float) -> bool:
    return not 0 < norm < float("inf")


def changes_anything(weights: AdapterWeights) -> bool:
    """Whether the first adapter changes what a base computes.

    Of a LoRA, whether any delta A B + C is not zero, by ||A B||_F^2 = tr(A'A B B'): no I x O matrix is formed. Of a gated memory,
    whether any gate can open, which takes w and V of one head.
    """
    if not weights.spec.zeros_change_nothing:
        return True
    for (layer, site, tensor), value_B in weights.tensors.items():
        value = value_B[0].double()
        if tensor == "C" and value.any():
            return True
        if tensor == "A":
            b_RO = weights.tensors[layer, site, "B"][0].double()
            if ((value.T @ value) * (b_RO @ b_RO.T)).sum() > 0:
                return True
        if tensor == "w" and (value * weights.tensors[layer, ATTENTION, "V"][0].double().abs().sum(dim=1)).any():
            return True
    return False
