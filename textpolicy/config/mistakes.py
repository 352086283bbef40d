"""The sentences on wrong settings: the key, its value, what is allowed, and the setting that may be meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

_UNTRAINABLE = ("top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
_LONGEST = 60  # characters of a wrong value that are shown
_MOST = 20  # mistakes that are listed


def explain(error: ValidationError, kind: type[BaseModel]) -> list[str]:
    """Return a clause for each of the first mistakes in a ``kind``: the key, its value, and what is allowed."""
    clauses, mistakes = [], error.errors()
    for mistake in mistakes[:_MOST]:
        path = [str(part) for part in mistake["loc"]]
        key = ".".join(path)
        match mistake["type"]:
            case "extra_forbidden":
                clauses.append(f"there is no setting {key!r}; {untrainable(path[-1]) or _did_you_mean(path, kind)}")
            case "model_type":
                first = next(iter(settings_of(_section(kind, path))))[0][0]
                clauses.append(f"{key} is {_short(mistake['input'])}; it is a section, so set {key}.{first} and others")
            case "tuple_type" | "list_type" if isinstance(mistake["input"], str):
                clauses.append(f'{key} is {_short(mistake["input"])}; write a list: ["{_short(mistake["input"])}"]')
            case "value_error":
                clauses.append(str(mistake["ctx"]["error"]))
            case "missing":
                clauses.append(f"{key} is missing; set it")
            case _:
                message = f"{mistake['msg'][0].lower()}{mistake['msg'][1:]}"
                clauses.append(f"{key} is {_short(mistake['input'])}; {message}")
    return clauses + ([f"and {len(mistakes) - _MOST} more mistakes"] if len(mistakes) > _MOST else [])


def _short(value: Any) -> str:
    """Return the beginning of a wrong value on one line."""
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _section(kind: type[BaseModel], path: Iterable[str]) -> type[BaseModel]:
    """Return the section at ``path`` below a ``kind``."""
    for part in path:
        if not part.isdecimal():  # the place in a list of sections
            annotation = kind.model_fields[part].annotation
            kind = annotation if isinstance(annotation, type) else get_args(annotation)[0]
    return kind


def _did_you_mean(path: list[str], kind: type[BaseModel]) -> str:
    """Return a hint at the settings that the unknown one at ``path`` may be: in its section, or else in any."""
    section = _section(kind, path[:-1])
    near = difflib.get_close_matches(path[-1], section.model_fields, n=1)
    near = near or nearest(path[-1], [".".join(known) for known, _ in settings_of(kind)])
    return (
        f"did you mean {' or '.join(map(repr, near))}?" if near else f"choose one of {', '.join(section.model_fields)}"
    )


def settings_of(kind: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Yield the path and field of every setting of a ``kind``, those of its sections included."""
    for name, field in kind.model_fields.items():
        if isinstance(field.default, BaseModel):
            yield from settings_of(type(field.default), (*above, name))
        elif name != "stage":  # a list of sections, which has no flag
            yield (*above, field.alias or name), field


def nearest(name: str, known: Sequence[str]) -> list[str]:
    """Return the ``known`` dotted names that ``name`` may mean: its last word elsewhere, initials, or a misspelling."""
    last = name.rpartition(".")[2]
    words = {path: path.rpartition(".")[2] for path in known}
    found = [path for path, word in words.items() if word == last]
    found = found or [path for path, word in words.items() if "".join(part[0] for part in word.split("_")) == last]
    if found or len(name) < 3:
        return [path for path in found if len(last) > 1][:3]
    return difflib.get_close_matches(name, known, n=1) or [
        path for path, word in words.items() if word in difflib.get_close_matches(last, words.values(), n=1)
    ]


def untrainable(name: str) -> str:
    """Return why training refuses a sampling setting of this ``name``; "" for any other name."""
    if name not in _UNTRAINABLE:
        return ""
    return (
        "training samples from the full distribution, which the update scores; leave it out, or set rollout.temperature"
    )
