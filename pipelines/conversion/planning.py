"""Behind `imprint plan`: a sample of a corpus, and the plan of converting all of it; `plan lift` by its own arithmetic.

In: a source as conversion reads it, a recipe of conversion, prices and assumptions. Out: a `ConvertPlan`. Loads no weights: of
the base its configuration and tokenizer, of a hypernetwork its settings.

The whole source is listed, and of each kind of file (by suffix; the kinds beyond `KINDS` together) some are drawn by the seed,
read as conversion reads them, tokenised and cut into windows. They stand for the rest of their kind by their bytes; where a file
is one document, their documents by the files. Of files of many rows the first rows are read, of `ROW_FILES` files at most, so
such files must not be sorted by length. Kinds share `Sample` equally; what a small one leaves, larger ones get, and a corpus that
fits is counted, not estimated. Holds the files drawn, never the listing. Costs the listing (a request in 1,000 objects), and by
default reading and tokenising 1,000 documents: seconds.
"""

import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field, PositiveInt, ValidationError, model_validator
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from core.adapters.base_model import TOKENIZER_FILES, load_base
from core.config import Section, faults, load, write_resolved
from core.planning.convert import Assumptions, ConvertPlan, Packing, Volume, memory_tokens, plan_convert, skeleton
from core.planning.costs import Prices
from core.planning.lift import PlanSettings, lines
from core.shine.hypernetwork import HypernetworkSettings
from core.text.documents import Document
from core.text.parsing import Parser
from core.text.tokens import read
from core.writing.writer import WindowRule
from pipelines.conversion.recipe import DTYPES, ConvertRecipe
from pipelines.corpus.files import UNKNOWN_SIZE, File, filesystem, suffixes
from pipelines.corpus.listing import list_files
from pipelines.corpus.reading import Reading, attempt
from pipelines.corpus.records import FORMATS, has_rows, is_whole, read_files
from pipelines.evaluation.lift_comparison import plan as plan_lift
from pipelines.world.reference import REFERENCE

KINDS, ROW_FILES, FETCHED_FILES = 64, 32, 8


class Sample(Section):
    """How much of a corpus is read, and which part of it."""

    documents: PositiveInt = 1000
    bytes: PositiveInt = 64 * 2**20
    seed: Annotated[int, Field(ge=0)] = 0


class PlanRecipe(ConvertRecipe):
    """A recipe of conversion, and what a plan needs besides.

    shape: of a hypernetwork that is yet to be trained; of one that `hypernetwork` names, its own settings hold.
    """

    shape: HypernetworkSettings = HypernetworkSettings()
    sample: Sample = Sample()
    prices: Prices = Prices()
    assumptions: Assumptions = Assumptions()

    @model_validator(mode="after")
    def _complete(self) -> "PlanRecipe":
        if self.method != "shine":
            raise ValueError("plan convert is for method shine: what lifting a corpus costs, `imprint plan lift` says")
        return self


def load_plan_recipe(
    base: str,
    hypernetwork: str | None,
    documents_per_s: str | None,
    path: Path | None,
    prices: Path | None,
    gpus: int | None,
    changes: Iterable[str],
) -> PlanRecipe:
    """A recipe with what the command line names; the reference base has the reference hypernetwork.

    prices: a TOML file of them. documents_per_s: see `measured_rate`.
    """
    if path is None and hypernetwork is None and Path(base) == REFERENCE / "base":
        hypernetwork = str(REFERENCE / "hypernetwork")
    rate = None if documents_per_s is None else measured_rate(documents_per_s)
    given = {"base": None if path else base, "hypernetwork": hypernetwork, "assumptions.documents_per_s": rate}
    named = [f"{name}={value}" for name, value in given.items() if value is not None]
    return load(PlanRecipe, path, [*named, *_shared(prices, gpus), *changes])


def load_run_recipe(
    recipe: Mapping[str, Any], documents_per_s: str | None, prices: Path | None, gpus: int | None, changes: Iterable[str]
) -> PlanRecipe:
    """The recipe by which a conversion ran, as JSON values, with prices and assumptions as of `load_plan_recipe`."""
    run = recipe["run"]
    if gpus is None and run["device"].startswith("cuda"):
        gpus = run["actors"]
    rate = [] if documents_per_s is None else [f"assumptions.documents_per_s={measured_rate(documents_per_s)}"]
    return load(PlanRecipe, None, [*rate, *_shared(prices, gpus), *changes], recipe)


def plan_lifting(
    source: str, base: str, path: Path | None, prices: Path | None, gpus: int | None, changes: Iterable[str]
) -> list[str]:
    """What `core.planning.lift` says of lifting a source, in lines; arguments as of `load_plan_recipe`."""
    settings = load(PlanSettings, path, [*_shared(prices, gpus), *changes])
    return lines(plan_lift(source, load_base(base), settings))


def _shared(prices: Path | None, gpus: int | None) -> list[str]:
    """Overrides of what every plan has."""
    named = {} if prices is None else load(Prices, prices).model_dump(exclude_unset=True)
    changes = [f"prices.{name}={json.dumps(value)}" for name, value in named.items()]
    return changes if gpus is None else [*changes, f"assumptions.gpus={gpus}"]


def measured_rate(text: str) -> float:
    """Documents a second of one GPU: a number, or a JSON file of a benchmark, of which the highest rate of conversion counts.

    Raises `ValueError` where it is neither.
    """
    try:
        return float(text)
    except ValueError:
        pass
    try:
        rates = list(_rates(json.loads(Path(text).read_text())))
    except (OSError, ValueError) as error:
        raise ValueError(f"{text} is neither a number of documents a second nor a JSON file that has one: {error}") from None
    if not rates:
        raise ValueError(f"{text} has no documents_per_s: give a number, or a result of benchmarks/ that measured it")
    return max(rates)


def _rates(values: Any) -> Iterator[float]:
    for name, value in values.items() if isinstance(values, dict) else ():
        if name in ("documents_per_s", "conversion_documents_per_s"):
            rate = value.get("median") if isinstance(value, dict) else value
            if isinstance(rate, int | float):
                yield rate
        elif name != "training":
            yield from _rates(value)


def plan_conversion(source: str, recipe: PlanRecipe, out: Path | None = None) -> ConvertPlan:
    """Samples a source and plans its conversion. out: a JSON file that keeps the plan.

    Raises `ValueError` for a source, base or hypernetwork that is not there, and where nothing can be converted.
    """
    base, (settings, trained_tokens) = skeleton(recipe.base), _hypernetwork(recipe)
    rule = recipe.windows
    max_tokens = rule.longest(base.max_length, memory_tokens(base, settings), trained_tokens)
    volume = sample(source, recipe, _Cut(_load_tokenizer(recipe.base), rule, max_tokens))
    packing = Packing(**{name: getattr(recipe.run, name) for name in Packing.model_fields})
    dtype = DTYPES[recipe.run.dtype]
    plan = plan_convert(volume, base, settings, recipe.encoding, packing, recipe.prices, recipe.assumptions, dtype)
    if out is not None:
        write_resolved(plan, out)
    return plan


def read_plan(path: Path) -> ConvertPlan:
    """A plan that was kept. Raises `ValueError` for anything else."""
    try:
        return ConvertPlan.model_validate_json(path.read_text())
    except OSError as error:
        raise ValueError(f"no plan at {path}: {error.strerror}; write one with `imprint plan convert --out`") from None
    except ValidationError as error:
        raise ValueError(f"{path} is not a plan of this version: {'; '.join(faults(error)[:3])}") from None


def _hypernetwork(recipe: PlanRecipe) -> tuple[HypernetworkSettings, int | None]:
    """Its settings, and how long the documents were that it was trained on, if anybody knows."""
    if recipe.hypernetwork is None:
        return recipe.shape, None
    path = Path(recipe.hypernetwork) / "hypernetwork.json"
    try:
        described = json.loads(path.read_text())
        return HypernetworkSettings.model_validate(described["settings"]), described.get("trained_tokens")
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"no hypernetwork's settings in {path}: {error}") from None


def _load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    path = Path(name)
    if path.exists() and not any((path / file).is_file() for file in TOKENIZER_FILES):
        raise ValueError(f"no tokenizer at {path}: save the base's beside its config.json")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer at {name}: {str(error).splitlines()[0]}") from None
    return tokenizer


class _Cut(NamedTuple):
    """How documents become windows, and windows adapters."""

    tokenizer: PreTrainedTokenizerBase
    rule: WindowRule
    max_tokens: int

    def volume(self, text: str, title: str) -> Volume:
        """What one document is, or a reject."""
        rejected = Volume(sampled=1, rejected=1)
        try:
            document = Document(tenant="plan", collection="plan", name="plan", title=title, text=text)
        except ValueError:
            return rejected
        tokens = read(self.tokenizer, document.text)
        sizes = [window.end - window.start for window in self.rule.covers(tokens, self.max_tokens)]
        if not 0 < len(sizes) <= self.rule.max_windows:
            return rejected
        return Volume(
            sampled=1,
            documents=1,
            text_bytes=len(document.text.encode()),
            tokens=len(tokens.ids),
            adapters=1 if self.rule.long_documents == "compose" else len(sizes),
            windows=len(sizes),
            window_tokens=sum(sizes),
            squared_tokens=sum(size**2 for size in sizes),
        )


@dataclass
class _Kind:
    """Files of one suffix: how many there are, their bytes as far as they are known, and those drawn of them."""

    files: int = 0
    sized: int = 0
    bytes: int = 0
    drawn: list[File] = field(default_factory=list)

    def offer(self, file: File, most: int, rng: random.Random) -> None:
        """Counts a file, and draws it with the same chance as every other (Vitter's algorithm R)."""
        self.files += 1
        if file.size_bytes != UNKNOWN_SIZE:
            self.sized += 1
            self.bytes += file.size_bytes
        if len(self.drawn) < most:
            self.drawn.append(file)
        elif (place := rng.randrange(self.files)) < most:
            self.drawn[place] = file


def sample(source: str, recipe: PlanRecipe, cut: _Cut) -> Volume:
    """What a source holds, from a sample of it. Raises `ValueError` where there is nothing, or nothing can be listed."""
    settings, rng = recipe.sample, random.Random(recipe.sample.seed)
    kinds: dict[str, _Kind] = {}
    try:
        for file in list_files(source):
            suffix = "".join(suffixes(file.name)) if not file.reason else ""
            suffix = suffix if suffix in kinds or len(kinds) < KINDS else ""
            kind = kinds.setdefault(suffix, _Kind())
            kind.offer(file, settings.documents if is_whole(file) else ROW_FILES, rng)
    except OSError as error:
        raise ValueError(f"{source} cannot be listed: {error}") from None
    if not kinds:
        raise ValueError(f"no files under {source}: give files of {' '.join(FORMATS)}")
    parser, whole = Parser(recipe.reading), Volume()
    documents, room = settings.documents, settings.bytes
    for done, kind in enumerate(sorted(kinds.values(), key=lambda kind: kind.bytes)):
        rng.shuffle(kind.drawn)
        share = len(kinds) - done
        volume, read_bytes = _estimate(kind, cut, parser, recipe.reading, max(documents // share, 1), room // share)
        whole += volume
        documents, room = max(documents - volume.sampled, 0), max(room - read_bytes, 0)
    return whole


def _estimate(kind: _Kind, cut: _Cut, parser: Parser, reading: Reading, most: int, most_bytes: int) -> tuple[Volume, int]:
    """The whole of a kind from `most` documents or rows of it, or `most_bytes`, and the bytes that were read.

    Of rows the first of a block has its bytes (`pipelines.corpus.records`), so what is begun of a block is read to its end.
    """
    drawn = [_sized(file) for file in kind.drawn]
    one_each = not any(map(has_rows, drawn))
    files_read, read_bytes, volume = 0, 0, Volume()
    few = (drawn[start : start + FETCHED_FILES] for start in range(0, len(drawn), FETCHED_FILES))
    for number, reads in enumerate(chain.from_iterable(read_files(files, parser, reading) for files in few)):
        last = volume.sampled + -(-(most - volume.sampled) // (len(drawn) - number))
        for found in reads:
            if volume.sampled and found.source_bytes and (volume.sampled >= last or read_bytes >= most_bytes):
                break
            read_bytes += found.source_bytes
            volume += cut.volume(found.text or "", found.title) if found.reason is None else Volume(sampled=1, rejected=1)
        files_read += 1
        if volume.sampled >= most or read_bytes >= most_bytes:
            break
    mean_bytes = sum(file.size_bytes for file in drawn) / len(drawn)
    source_bytes = kind.bytes + round((kind.files - kind.sized) * mean_bytes)
    by_files = kind.files / files_read
    by_bytes = source_bytes / read_bytes if read_bytes else by_files
    estimate = volume.scaled(by_bytes).model_copy(update={"files": kind.files, "source_bytes": source_bytes})
    if one_each:
        counts = {"documents": volume.documents * by_files, "rejected": volume.rejected * by_files}
        estimate = estimate.model_copy(update=counts)
    return estimate, read_bytes


def _sized(file: File) -> File:
    """With its size where a listing did not say it; 0 where it cannot be had."""
    if file.size_bytes != UNKNOWN_SIZE or file.reason:
        return file._replace(size_bytes=max(file.size_bytes, 0))
    size = attempt(lambda: int(filesystem(file.url).size(file.url) or 0))
    return file._replace(size_bytes=0 if isinstance(size, Exception) else size)
