"""Near misses: what a caller probably meant by a name that does not exist. Only names of the API itself and of the deployment belong
here: a suggestion must never tell one tenant what another one has.
"""

import types
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Annotated, Literal, TypeGuard, Union, cast, get_args, get_origin

from pydantic import BaseModel

MIN_SIMILARITY = 0.6  # difflib's default: "learning_rte" is 0.96 like "learning_rate", "lr" only 0.27
MIN_PREFIX_CHARS = 2
MAX_NAME_CHARS = 64  # comparing takes time by the square of the length


def find_near_miss(name: str, known: Iterable[str]) -> str | None:
    """The known name that begins with `name`, or else is most like it, without regard to case; None when none is like it."""
    if not MIN_PREFIX_CHARS <= len(name) <= MAX_NAME_CHARS:
        return None
    by_lower_case = {each.lower(): each for each in known}
    longer = [each for each in by_lower_case if each.startswith(name.lower())]
    matches = longer or get_close_matches(name.lower(), by_lower_case, n=1, cutoff=MIN_SIMILARITY)
    return by_lower_case[matches[0]] if matches else None


def did_you_mean(name: str, known: Iterable[str], hint: str = "") -> str:
    """The hint for an unknown name: the near miss, if there is one, before what else would help."""
    match = find_near_miss(name, known)
    question = f"did you mean {match}?" if match else ""
    return " ".join(filter(None, (question, hint)))


def list_fields(model: object, path: Sequence[str | int]) -> tuple[str, ...]:
    """The fields of the object at a path in a model, where the path is as pydantic's errors give it; empty if there is none."""
    return tuple(dict.fromkeys(name for each in _descend(model, path) for name in each.model_fields))


def find_parents(model: object, name: str) -> tuple[str, ...]:
    """The paths of the objects in a model that have a field of this name, without list items."""
    return tuple(dict.fromkeys(_iter_parents(model, name, "")))


def _descend(annotation: object, path: Sequence[str | int]) -> Iterator[type[BaseModel]]:
    """The models that the object at the path may be."""
    for member in _iter_members(annotation):
        if _is_model(member) and (not path or path[0] in member.model_fields):
            if path:
                yield from _descend(member.model_fields[str(path[0])].annotation, path[1:])
            else:
                yield member
        elif _is_model(member) and _has_tag(member, path[0]):  # pydantic puts the tag of a union's member into the path
            yield from _descend(member, path[1:])
        elif get_origin(member) is list and path and isinstance(path[0], int):
            yield from _descend(get_args(member)[0], path[1:])


def _iter_members(annotation: object) -> Iterator[object]:
    """The members of a union, and the annotation itself where it is none."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _iter_members(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _iter_members(member)
    else:
        yield annotation


def _is_model(annotation: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _has_tag(model: type[BaseModel], tag: str | int) -> bool:
    annotations = (cast(object, field.annotation) for field in model.model_fields.values())
    return any(get_origin(each) is Literal and tag in get_args(each) for each in annotations)


def _iter_parents(annotation: object, name: str, path: str) -> Iterator[str]:
    for member in _iter_members(annotation):
        if not _is_model(member):
            continue
        if name in member.model_fields:
            yield path
        for field_name, field in member.model_fields.items():
            yield from _iter_parents(field.annotation, name, f"{path}.{field_name}".removeprefix("."))
