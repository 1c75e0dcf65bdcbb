"""What is wrong with a document that does not fit a msgspec type, in the words of someone who writes YAML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from msgspec import inspect


def explain(error: msgspec.ValidationError, kind: Any) -> str:
    """`Invalid value 'x' - at `$.weights.dtype`` with the values that there are.

    Args:
        error: what `msgspec.convert` raised.
        kind: the type that it was to convert to.
    """
    text = str(error).replace("Object contains unknown field", "unknown key").replace("Object missing", "missing")
    message, _, path = text.partition(" - at ")
    place = path.strip("`").removeprefix("$").removeprefix(".")
    found = _types_at(place, kind)
    tagged = [each for each in found if isinstance(each, inspect.StructType) and each.tag is not None]
    said = f"{message} in {place}" if place else message
    if message.startswith("unknown key"):
        return f"{said}: {_keys(found, message.split('`')[1])}"
    if choices := list(dict.fromkeys(_values(found))):
        return f"{said}: choose one of {', '.join(choices)}"
    if tagged and (message.startswith("Expected") or message == f"missing required field `{tagged[0].tag_field}`"):
        return f"{said}: give {tagged[0].tag_field}, one of {', '.join(str(each.tag) for each in tagged)}"
    return said


def _keys(found: Iterable[inspect.Type], key: str) -> str:
    """Which kinds have a key that this one has not, or else the keys that there are."""
    structs = [each for each in found if isinstance(each, inspect.StructType)]
    owners = [each for each in structs if key in (field.encode_name for field in each.fields)]
    if owners:
        return f"only {owners[0].tag_field} {', '.join(str(each.tag) for each in owners)} has it"
    tags = [each.tag_field for each in structs if each.tag_field is not None]
    names = [field.encode_name for each in structs for field in each.fields]
    return f"choose one of {', '.join(dict.fromkeys((*tags, *names)))}"


def _types_at(place: str, kind: Any) -> list[inspect.Type]:
    """The types that may stand at `rules[0].match.role`, unions resolved into what they hold."""
    types = list(_members(inspect.type_info(kind)))
    for key in re.findall(r"\[[^]]*\]|[^.\[]+", place):
        types = [member for each in types for inner in _inside(each, key) for member in _members(inner)]
    return types


def _members(kind: inspect.Type) -> Iterator[inspect.Type]:
    if isinstance(kind, inspect.UnionType):
        for each in kind.types:
            yield from _members(each)
    else:
        yield kind


def _inside(kind: inspect.Type, key: str) -> Iterator[inspect.Type]:
    match kind:
        case inspect.StructType(fields=fields, tag_field=tag_field, tag=tag):
            if key == tag_field:
                yield inspect.LiteralType((str(tag),))
            yield from (field.type for field in fields if field.encode_name == key)
        case inspect.VarTupleType(item_type=item) | inspect.ListType(item_type=item):
            yield item


def _values(types: Iterable[inspect.Type]) -> Iterator[str]:
    """What enumerations and tags may be."""
    for kind in types:
        match kind:
            case inspect.EnumType(cls=members):
                yield from (str(member.value) for member in members)
            case inspect.LiteralType(values=values):
                yield from map(str, values)
