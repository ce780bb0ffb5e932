"""Typed configurations: frozen, unknown keys refused with the nearest known one, dotted overrides."""

from __future__ import annotations

import math
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import Self

from flown.base.errors import FlownError, unknown
from flown.base.files import parse_json, read_text

_DEPTH = 24  # of values in values
_LONGEST = 200  # letters of a place that messages name


Size = Annotated[int, Field(ge=1, le=65_536)]  # of a layer, a side, a number of layers


class Config(BaseModel):
    """A frozen typed record. Subclasses live beside what they configure."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str = "config") -> Self:
        """Builds the record from plain values.

        Raises:
            FlownError: a key is unknown (the nearest is named) or a value has the wrong type.
        """
        if not isinstance(values, Mapping):
            raise FlownError(f"{where}: expected keys and values, got {type(values).__name__}")
        check_plain(values, where)
        _refuse_unknown_keys(cls, values, where)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            what = first["msg"].removeprefix("Value error, ")
            if not key:  # of the record as a whole
                raise FlownError(f"{where}: {what}") from None
            raise FlownError(f"{where}: {key}: {what} (got {first.get('input')!r})") from None

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Reads a YAML or JSON file.

        Raises:
            FlownError: no such file, not YAML/JSON, or as `parse`.
        """
        return cls.parse(read_mapping(path), where=str(path))

    def override(self, assignments: Sequence[str]) -> Self:
        """Returns a copy with `key.sub=value` assignments applied; values are read as YAML.

        A new `kind` drops the keys of the old one, wherever it stands among the assignments.
        """
        values = self.model_dump(mode="json")
        for assignment in sorted(assignments, key=lambda text: not _names_kind(text)):
            key, sign, text = assignment.partition("=")
            if not sign:
                raise FlownError(f"override '{assignment}': write it as key.sub=value")
            target, *rest = values, *key.split(".")
            for part in rest[:-1]:
                target = target.setdefault(part, {})  # an unknown part is refused by `parse`
                if not isinstance(target, dict):
                    raise FlownError(f"override '{assignment}': '{part}' holds no keys")
            value = yaml.safe_load(text)
            if _names_kind(assignment) and target.get(rest[-1]) != value:
                target.clear()
            target[rest[-1]] = value
        return type(self).parse(values, where="override")


def _names_kind(assignment: str) -> bool:
    return assignment.partition("=")[0].split(".")[-1] == "kind"


def check_plain(values: Any, where: str, depth: int = 0) -> None:
    """Refuses what no file of ours has: numbers of more than 64 bits, NaN, Inf, nesting without end.

    Raises:
        FlownError: there is such a value.
    """
    if depth > _DEPTH:
        raise FlownError(f"{where}: nested more than {_DEPTH} deep")
    if isinstance(values, Mapping):
        for key, value in values.items():
            check_plain(value, f"{where}: {key}"[:_LONGEST], depth + 1)
    elif isinstance(values, list | tuple):
        for value in values:
            check_plain(value, where, depth + 1)
    elif isinstance(values, float) and not math.isfinite(values):
        raise FlownError(f"{where}: {values} is no finite number")
    elif isinstance(values, int) and not -(2**63) <= values < 2**63:
        raise FlownError(f"{where}: holds a number of more than 64 bits")


def read_mapping(path: Path | str) -> dict[str, Any]:
    """The keys and values of a YAML or JSON file."""
    path, text = Path(path), read_text(path)
    if path.suffix == ".json":
        values = parse_json(text, path)
    else:
        try:
            values = yaml.safe_load(text)
        except (ValueError, yaml.YAMLError) as error:
            raise FlownError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
        except RecursionError:
            raise FlownError(f"{path}: not valid YAML (nested too deeply)") from None
    if not isinstance(values, dict):
        raise FlownError(f"{path}: expected keys and values at the top level")
    return values


def _refuse_unknown_keys(cls: type[BaseModel], values: Mapping[str, Any], where: str) -> None:
    for key, value in values.items():
        if key not in cls.model_fields:
            raise FlownError(f"{where}: {unknown('key', key, cls.model_fields)}")
        record = _record(cls.model_fields[key].annotation, value)
        if record is not None:
            _refuse_unknown_keys(record, value, f"{where}: {key}")


def _record(annotation: Any, value: Any) -> type[BaseModel] | None:
    """The record type that a mapping is to become; among several, the one of its `kind`."""
    if not isinstance(value, Mapping) or typing.get_origin(annotation) is dict:
        return None  # the keys of a dict are free; pydantic checks the records behind them
    options = [
        kind
        for kind in (annotation, *typing.get_args(annotation))
        if isinstance(kind, type) and issubclass(kind, BaseModel)
    ]
    if len(options) < 2:
        return options[0] if options else None
    kinds = {option.model_fields["kind"].default: option for option in options}
    return kinds.get(str(value.get("kind", next(iter(kinds)))))
