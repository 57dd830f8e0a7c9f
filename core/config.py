"""Recipes: sparse TOML in, frozen pydantic sections out, and a fingerprint of what bears identity.

A recipe is one `Section` whose fields are sections. Sections live beside the code that uses them. A `RunSection` says how and
where to run (workers, devices, batch sizes of a stream): it never bears identity, so `fingerprint` leaves it out.
"""

import copy
import hashlib
import json
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError


class Section(BaseModel):
    """Part of a recipe that changes the result."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RunSection(Section):
    """Part of a recipe that changes only where and how fast it runs."""


SectionT = TypeVar("SectionT", bound=Section)


def load(
    schema: type[SectionT], path: Path | None = None, overrides: Iterable[str] = (), resolved: Mapping[str, Any] | None = None
) -> SectionT:
    """Reads a TOML recipe and applies dotted overrides such as `optimiser.learning_rate=1e-4`.

    An override's value is read as TOML; what is not TOML is taken as a string. resolved: a recipe as JSON values, which stands
    in a file's place. Raises `ValueError` naming the field and what is accepted there.
    """
    values: dict[str, Any] = copy.deepcopy(dict(resolved or {}))
    if path is not None:
        try:
            values = tomllib.loads(Path(path).read_text())
        except (FileNotFoundError, IsADirectoryError):
            raise ValueError(f"no recipe at {path}: give the path of a TOML file") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not TOML: {error}") from None
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator:
            raise ValueError(f"override {override!r} has no '=': write section.field=value")
        *parents, leaf = key.strip().split(".")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"override {override!r}: {parent} is a value, not a section")
        node[leaf] = _toml_value(text.strip())
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{path or 'what was given'} is not valid:\n  " + "\n  ".join(faults(error))) from None


def faults(error: ValidationError) -> list[str]:
    """What pydantic found wrong, a line for each field: where it is, and what is accepted there."""
    return [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def identity(section: Section) -> dict[str, Any]:
    """The section as plain JSON values, without what never bears identity."""
    values = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, RunSection):
            continue
        values[name] = identity(value) if isinstance(value, Section) else section.model_dump(mode="json", include={name})[name]
    return values


def digest(value: Any) -> str:
    """SHA-256 (hex) of a JSON value in canonical form: sorted keys, no blanks."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fingerprint(section: Section) -> str:
    """SHA-256 (hex) over the identity of a section: equal recipes, equal fingerprints, whatever they run on."""
    return digest(identity(section))


def write_resolved(section: Section, path: Path) -> None:
    """Writes every value of a recipe, defaults included, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(section.model_dump(mode="json"), indent=2) + "\n")
