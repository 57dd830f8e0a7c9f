"""What several commands are asked in the same words: options, arguments and their choices."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

REFERENCE = Path(__file__).parent.parent / "assets" / "reference"

Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Change a recipe's value: `section.field=value`; may be repeated.")
]
BaseOption = Annotated[str, typer.Option(help="Model directory or Hugging Face name.", show_default="the reference base")]
HypernetworkOption = Annotated[
    str, typer.Option(help="Directory of a trained or imported hypernetwork.", show_default="the reference hypernetwork")
]
PresetOption = Annotated[
    str | None, typer.Option(help="LIFT's settings by name: v1, v3, v4, v4_fast or finetune_raw.", show_default="v4")
]
SourceArgument = Annotated[str, typer.Argument(help="Text, Markdown, HTML, PDF, JSON, CSV, Parquet: file, folder, glob, @list.")]
StoreArgument = Annotated[str, typer.Argument(help="The store; made where there is none.")]


class Kind(StrEnum):
    base = "base"
    hypernetwork = "hypernetwork"
    pre_lift = "pre-lift"


class Method(StrEnum):
    shine = "shine"
    lift = "lift"


class Planned(StrEnum):
    convert = "convert"
    lift = "lift"


class Form(StrEnum):
    loogle = "loogle"
    longbench = "longbench"


class Mode(StrEnum):
    auto = "auto"
    adapter = "adapter"
    in_context = "in_context"
    adapter_in_context = "adapter_in_context"
