"""A plan of conversion as people read it in a terminal: a table of what it takes, and one of what else could be made.

Bytes are decimal (a TB is 10^12), money is in the plan's currency. Knows no arithmetic of its own.
"""

from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from core.adapters.layout import ENCODINGS, Encoding
from core.adapters.spec import SITES
from core.planning.convert import PART_BYTES, ConvertPlan, WorkerMemory
from pipelines.terminal import amount, counted, framed, size

_Row = tuple[str, str, str]


def plan_tables(plan: ConvertPlan, source: str) -> RenderableType:
    """The plan, and its alternatives."""
    return Group(_table(f"Plan: converting {source}", plan, None), Text(), _alternatives(plan))


def taken_table(plan: ConvertPlan, taken: ConvertPlan) -> RenderableType:
    """The plan beside what it took."""
    return _table("Planned, and what it took", plan, taken)


def _table(title: str, plan: ConvertPlan, taken: ConvertPlan | None) -> Table:
    table = framed(title)
    table.add_column("", no_wrap=True)
    table.add_column("planned", justify="right", no_wrap=True)
    if taken is not None:
        table.add_column("took", justify="right", no_wrap=True, style="bold")
    table.add_column("", style="dim")
    for section, others in zip(_sections(plan), _sections(taken or plan), strict=True):
        for (label, figure, note), (_, took, took_note) in zip(section, others, strict=True):
            table.add_row(label, figure, *([note] if taken is None else [took, took_note]))
        table.add_section()
    return table


def _sections(plan: ConvertPlan) -> Iterable[list[_Row]]:
    volume, made, assumed, prices = plan.volume, plan.made, plan.assumptions, plan.prices
    whole = volume.sampled >= round(volume.documents + volume.rejected)
    known = "all were read" if whole else f"estimated from {volume.sampled:,}"
    if plan.measured:
        known = f"beside {plan.already:,} that had adapters already" if plan.already else ""
    yield [
        ("documents", f"{volume.documents:,.0f}", known),
        ("rejected", f"{volume.rejected:,.0f}", f"source: {counted(volume.files, 'file')}, {size(volume.source_bytes)}"),
        ("tokens", f"{volume.tokens:,.0f}", f"{plan.tokens_saved:,.0f} a document; {size(volume.text_bytes)} of text"),
    ]
    yield [
        ("adapters", f"{volume.adapters:,.0f}", f"{sites(made.sites)} at rank {made.rank}, in {made.encoding}"),
        ("each", size(made.bytes), f"read with {counted(-(-made.bytes // PART_BYTES), 'GET')}"),
        ("together", size(plan.adapter_bytes), f"{money(plan.month_cost)} {prices.currency} a month, texts included"),
        ("shards", f"{plan.shards:,}", f"of {size(plan.stored_bytes / plan.shards)}"),
        ("requests", f"{plan.puts + plan.gets:,}", f"{counted(plan.puts, 'PUT')}, {counted(plan.gets, 'GET')}"),
    ]
    seconds = plan.hours * 3600
    how = f"at {assumed.utilisation:.0%} of {assumed.peak_tflops:g} TFLOP/s, {plan.flops / volume.documents:.1e} FLOPs a document"
    if plan.gpu_hours * 3600 * assumed.flops_per_s > plan.flops * 1.001:
        how = f"at {assumed.pass_s:g} s a forward pass, too small for more"
    if assumed.documents_per_s is not None:
        how = f"at {amount(assumed.documents_per_s)} documents/s a GPU, as measured"
    if plan.measured:
        reached = plan.flops / plan.gpu_hours / 3600
        of_peak = f"{reached / assumed.peak_tflops / 1e12:.0%} of {assumed.peak_tflops:g} TFLOP/s"
        how = f"at {of_peak}" if plan.hardware == "GPU" else f"of CPU processes, at {reached:.1e} FLOP/s"
    rates = f"{amount(volume.documents / seconds)} documents/s, {size(plan.stored_bytes / seconds)}/s to store"
    yield [
        (f"{plan.hardware} hours", amount(plan.gpu_hours), how),
        ("by the clock", duration(seconds), f"{counted(assumed.gpus, plan.hardware)}: {rates}"),
        ("memory of each", size(plan.worker.together), _memory(plan.worker)),
    ]
    currency, months = prices.currency, assumed.storage_months
    yield [
        (f"{currency} for GPUs", money(plan.gpu_cost), f"at {prices.gpu_hour:g} an hour"),
        ("for requests", money(plan.request_cost), f"at {prices.put_per_thousand:g} a thousand PUTs"),
        ("for storage", money(plan.month_cost * months), f"{months:g} months at {prices.storage_per_gb_month:g} a GB"),
        ("together", money(plan.cost), f"{money(plan.cost / volume.documents)} a document"),
    ]
    prompts = "questions a document, against prompts"
    yield [
        ("pays off after", questions(plan.break_even), f"{prompts} at {prices.prompt_per_million:g} a million"),
        ("", questions(plan.break_even_own), f"{prompts} on the same GPUs"),
    ]


def _memory(worker: WorkerMemory) -> str:
    return f"base {size(worker.base)}, hypernetwork {size(worker.hypernetwork)}, a full batch {size(worker.batch)}"


def _alternatives(plan: ConvertPlan) -> Table:
    shown: list[Encoding] = [encoding for encoding in ENCODINGS if encoding in ("bf16", "int8", "int4", plan.made.encoding)]
    table = framed("The same documents in other adapters: all of them in each encoding")
    table.add_column("sites", no_wrap=True)
    table.add_column("rank", justify="right")
    table.add_column("GPU hours", justify="right")
    table.add_column(f"one in {plan.made.encoding}", justify="right", no_wrap=True)
    for encoding in shown:
        table.add_column(encoding, justify="right", no_wrap=True)
    for other in plan.alternatives:
        chosen = (other.sites, other.rank) == (plan.made.sites, plan.made.rank)
        totals = [
            Text(size(other.bytes[encoding] * plan.volume.adapters), "green" if chosen and encoding == plan.made.encoding else "")
            for encoding in shown
        ]
        one = size(other.bytes[plan.made.encoding])
        table.add_row(sites(other.sites), str(other.rank), amount(other.gpu_hours), one, *totals, style="bold" if chosen else "")
    return table


def sites(names: tuple[str, ...]) -> str:
    """The sites by name, or that it is all of them."""
    return "every linear" if set(names) == set(SITES) else " ".join(names)


def money(value: float) -> str:
    """Whole units from 100 on, cents from 1 on, else two digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.2g}"


def duration(seconds: float) -> str:
    """In seconds, minutes, hours or days, whichever gives one to three digits."""
    for unit, length, most in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if seconds < most * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{amount(seconds / 86400)} days"


def questions(value: float | None) -> str:
    return "never" if value is None else amount(value)
