"""Read command-line arguments into settings; every mistake is reported in one sentence."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from .._system.files import parse_json
from ..errors import UserError
from .mistakes import explain, nearest, settings_of, untrainable
from .settings import Positional, merged

Arguments = TypeVar("Arguments", bound=BaseModel)
_COLUMN = 28  # of the meaning of a flag in the help, counted from 0
_WIDEST = 110  # columns of the help
_CHOICES = 20  # characters of choices that are shown beside the flag
_SPELLS = re.compile(r"true|false|null|-?(0|[1-9]\d*)(\.\d+)?", re.IGNORECASE)
_METAVARS: dict[Any, str] = {int: "N", float: "X", str: "TEXT", Path: "PATH", list: "A,B,...", dict: "NAME=VALUE,..."}


def parse(
    kind: type[Arguments], arguments: Sequence[str], command: str, *, program: str = "textpolicy", **defaults: Any
) -> Arguments:
    """Return the ``arguments`` as a ``kind``; flags override ``defaults``. Raises UserError for a mistake."""
    return checked(kind, merged(defaults, read(kind, arguments, command, program=program)))


def checked(kind: type[Arguments], values: Mapping[str, Any]) -> Arguments:
    """Return nested ``values`` as a ``kind``. Raises UserError for a mistake."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UserError("; ".join(explain(error, kind))) from error


@dataclass(frozen=True, eq=False)
class Argument:
    """The flag of one setting, or its place among the words that are no flags."""

    path: tuple[str, ...]  # names of the sections, and of the setting
    field: FieldInfo

    @cached_property
    def type(self) -> tuple[Any, bool]:
        """The type without limits, list for every kind of list, and whether None is allowed."""
        found, nullable = _bare(self.field.annotation)
        return list if get_origin(found) in (tuple, list) else get_origin(found) or found, nullable

    @property
    def positional(self) -> bool:
        """The fact that it has no flag."""
        return Positional in self.field.metadata

    @property
    def shown(self) -> str:
        """The flag, such as --optimizer.learning-rate, or the name in capitals."""
        return self.path[-1].upper() if self.positional else "--" + ".".join(self.path).replace("_", "-")

    def value(self, words: Sequence[str]) -> Any:
        """Return what the ``words`` after the flag, or in the place, stand for. Raises UserError for a table."""
        if self.type[0] is dict:
            return {name: value for word in words for name, value in self._table(word).items()}
        if self.type[0] is not list:
            return _one(self.field.annotation, words[-1])
        item = get_args(_bare(self.field.annotation)[0])[0]
        items = words if self.positional else [item for word in words for item in _items(word)]
        return [_one(item, text) for text in items]

    def _table(self, word: str) -> dict[str, Any]:
        """Return a JSON object, or NAME=VALUE,... whose values true, false, null and numbers are what they spell."""
        try:
            if word.lstrip().startswith("{"):
                return dict(parse_json(word))
            pairs = dict(pair.split("=", 1) for pair in _items(word))
            return {n: parse_json(text.lower()) if _SPELLS.fullmatch(text) else text for n, text in pairs.items()}
        except ValueError as error:
            raise UserError(f"{self.shown} cannot be read; write NAME=VALUE,NAME=VALUE or a JSON object") from error


def read(
    kind: type[BaseModel], arguments: Sequence[str], command: str = "", *, program: str = "textpolicy"
) -> dict[str, Any]:
    """Return the settings that ``arguments`` give, as nested dicts; print the help and exit if they ask for it.

    A list takes words separated by commas, and every word up to the next flag where the command has no arguments
    without a flag; those are taken as they stand, whatever they look like. Raises UserError.
    """
    known = [Argument(path, field) for path, field in settings_of(kind)]
    flags, places = {a.shown: a for a in known if not a.positional}, [a for a in known if a.positional]
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    if {"-h", "--help"} & {*before}:
        print(describe(kind, known, f"{program} {command}".strip()))
        raise SystemExit(0)
    given: dict[Argument, list[str]] = {}
    others: list[str] = []
    words = deque(arguments)
    while words:
        word = words.popleft()
        name, equals, value = word.partition("=")
        turned_off = flags.get(name.replace("--no-", "--", 1))
        if word == "--":
            others += words
            break
        if name in flags:
            flag = flags[name]
            if flag.type[0] is bool and not equals:
                value = "true"
            elif not equals:
                if not words or words[0].startswith("--"):
                    raise UserError(f"{name} needs a value; write {name}=VALUE")
                value = words.popleft()
            given[flag] = [*given.get(flag, ()), value]
            while flag.type[0] is list and not places and words and not words[0].startswith("-"):
                given[flag].append(words.popleft())
        elif turned_off is not None and turned_off.type[0] is bool and not equals:
            given[turned_off] = ["false"]
        elif re.match(r"-[^\d.]", word) and not re.search(r"\s", word):
            raise _unknown(word, [a.path for a in known if not a.positional])
        else:
            others.append(word)
    for place in places:
        if taken := others if place.type[0] is list else others[:1]:
            given[place], others = taken, others[len(taken) :]
    if others:
        raise UserError(f"the command does not take {' '.join(others)!r}; leave it out, or quote words with blanks")
    if missing := [a.shown for a in known if a.field.is_required() and a not in given]:
        raise UserError(f"{missing[0]} is missing; give it, or ask for --help")
    found: dict[str, Any] = {}
    for argument, texts in given.items():
        nested = argument.value(texts)
        for part in reversed(argument.path):
            nested = {part: nested}
        found = merged(found, nested)
    return found


def _unknown(word: str, paths: Iterable[Sequence[str]]) -> UserError:
    """Return the error for a flag that does not exist; it names those that were probably meant."""
    name = word.partition("=")[0]
    dotted = name.lstrip("-").replace("-", "_")
    known = [".".join(path) for path in paths]
    inside = [path for path in known if f".{path}".rpartition(".")[0].endswith(f".{dotted}")]
    shown = ["--" + path.replace("_", "-") for path in inside[:1] or nearest(dotted, known)]
    hint = untrainable(dotted.rpartition(".")[2]) or (f"did you mean {' or '.join(shown)}?" if shown else "")
    if inside:
        return UserError(f"{name} is a section, whose settings have flags of their own, such as {shown[0]}")
    return UserError(f"there is no flag {word}; {hint or 'ask for --help to see all'}")


def _bare(annotation: Any) -> tuple[Any, bool]:
    """Return a type without its limits, and whether it allows None."""
    nullable = False
    while get_origin(annotation) in (Annotated, Union, UnionType):
        nullable = nullable or NoneType in get_args(annotation)
        annotation = next(part for part in get_args(annotation) if part is not NoneType)
    return annotation, nullable


def _items(word: str) -> list[Any]:
    """Return the items of a list: JSON, or text separated by commas; none if it is empty."""
    if word.startswith("["):
        try:
            return list(parse_json(word))
        except ValueError:
            pass  # a name that begins with a bracket
    return [item.strip() for item in word.split(",")] if word.strip() else []


def _one(annotation: Any, text: Any) -> Any:
    """Return ``text`` for pydantic to check: None for "None" where that is allowed and no text, a choice as it is."""
    found, nullable = _bare(annotation)
    if get_origin(found) is Literal:
        text = next((choice for choice in get_args(found) if str(choice) == text), text)
    return None if nullable and text == "None" and found not in (str, Path) else text


def describe(kind: type[BaseModel], known: Sequence[Argument], command: str) -> str:
    """Return the help of a ``command``: its arguments by section, each with its meaning, choices and default."""
    width = max(min(shutil.get_terminal_size().columns, _WIDEST), 30)
    column = _COLUMN if width >= 2 * _COLUMN else 6
    places = [f"{a.shown}{' ...' if a.type[0] is list else ''}" for a in known if a.positional]
    required = [a.field.is_required() for a in known if a.positional]
    words = [place if needed else f"[{place}]" for place, needed in zip(places, required, strict=True)]
    words += ["[--FLAG VALUE ...]"] if len(words) < len(known) else []
    usage = f"usage: {' '.join([command, *words])}"
    lines = textwrap.wrap(usage, width, subsequent_indent="    ", break_on_hyphens=False)
    section: tuple[str, ...] | None = None
    for argument in sorted(known, key=lambda a: (len(a.path) > 1, not a.positional)):
        if argument.path[:-1] != section:
            section = argument.path[:-1]
            meaning = kind
            for part in section:
                meaning = type(meaning.model_fields[part].default)
            title = f"{'.'.join(section)}: {meaning.__doc__ or ''}" if section else meaning.__doc__ or ""
            lines += ["", *textwrap.wrap(title, width), *([] if section else [""])]
        lines += _described(argument, column, width)
    return "\n".join(lines)


def _described(argument: Argument, column: int, width: int) -> list[str]:
    """Return the lines of one argument: the flag, and from ``column`` on what it means."""
    found, _ = _bare(argument.field.annotation)
    choices = [str(choice) for choice in get_args(found)] if get_origin(found) is Literal else []
    short = "|".join(choices) if len("|".join(choices)) <= _CHOICES else "WORD"
    metavar = "" if argument.type[0] is bool else _METAVARS.get(argument.type[0], short or "VALUE")
    default = argument.field.get_default(call_default_factory=True)
    flag = argument.shown.replace("--", "--no-", 1) if default is True else argument.shown
    head = f"  {flag}" if argument.positional else f"  {flag} {metavar}".rstrip()
    text = argument.field.description or ""
    text += f" One of {', '.join(choices)}." if short == "WORD" else ""
    known = not (
        argument.field.is_required() or default is None or isinstance(default, bool) or default in ((), [], {})
    )
    text += f" [{default}]" if known else ""
    lines = textwrap.wrap(text, width - column, break_on_hyphens=False) or [""]
    if len(head) + 2 > column:
        return [head, *(" " * column + line for line in lines)]
    return [f"{head:<{column}}{lines[0]}".rstrip(), *(" " * column + line for line in lines[1:])]
