"""Print docs/09_cli.md with its tables, made from the command line itself: python scripts/cli_page.py."""

import argparse
import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from textpolicy.cli.campaign import COMMANDS as CAMPAIGN
from textpolicy.cli.main import COMMANDS, AlgorithmsArguments, DoctorArguments, TasksArguments
from textpolicy.config.mistakes import settings_of
from textpolicy.config.settings import Config, Positional
from textpolicy.report.page import ReportArguments
from textpolicy.report.view.server import ViewArguments
from textpolicy.run.export import ExportArguments
from textpolicy.run.inference import EvalArguments, GenerateArguments
from textpolicy.run.resume import TrainArguments
from textpolicy.serve.command import ServeArguments, TinkerServerArguments

PAGE = Path(__file__).resolve().parents[1] / "docs" / "09_cli.md"
MARK = "<!-- written by scripts/cli_page.py: {} -->"
ARGUMENTS: dict[str, type[BaseModel]] = {
    "generate": GenerateArguments,
    "eval": EvalArguments,
    "view": ViewArguments,
    "report": ReportArguments,
    "export": ExportArguments,
    "doctor": DoctorArguments,
    "algorithms": AlgorithmsArguments,
    "tasks": TasksArguments,
    "serve": ServeArguments,
    "tinker-server": TinkerServerArguments,
}
Row = tuple[str, str, str, str]  # name, kind, default, meaning


def commands() -> str:
    """The table of commands, one line each, as ``textpolicy --help`` prints them."""
    rows = [
        (f"`{name}`", meaning.split(": textpolicy")[0].rstrip(".") + ".") for name, (_, meaning) in COMMANDS.items()
    ]
    return table(("command", "what it does"), rows)


def arguments() -> str:
    """The sections of commands that have their own arguments."""
    parts = [section(f"textpolicy {name}", kind) for name, kind in ARGUMENTS.items()]
    own = {name: field for name, field in TrainArguments.model_fields.items() if name not in Config.model_fields}
    train = table(("argument", "kind", "default", "meaning"), [row(name, field, "--") for name, field in own.items()])
    first = f"### textpolicy train\n\nA TOML file, every setting [below](#settings) as a flag, and:\n\n{train}"
    campaign = [section(f"textpolicy campaign {name}", kind) for name, (kind, *_) in CAMPAIGN.items()]
    return "\n\n".join([first, *parts, *campaign])


def section(title: str, kind: type[BaseModel]) -> str:
    rows = [row(".".join(path), field, "--") for path, field in settings_of(kind)]
    return f"### {title}\n\n{kind.__doc__}\n\n" + table(("argument", "kind", "default", "meaning"), rows)


def settings() -> str:
    """The tables of a run's settings, one per section."""
    top = [row(n, f, "") for n, f in Config.model_fields.items() if not isinstance(f.default, BaseModel)]
    tables = [f"### The run itself\n\n{table(('setting', 'kind', 'default', 'meaning'), top)}"]
    for name, field in Config.model_fields.items():
        if isinstance(field.default, BaseModel):
            tables += of_section(name, type(field.default))
    return "\n\n".join(tables)


def of_section(path: str, kind: type[BaseModel]) -> list[str]:
    rows = [row(n, f, "") for n, f in kind.model_fields.items() if not isinstance(f.default, BaseModel)]
    heading = f"### {path}\n\n{kind.__doc__}\n\n"
    deeper = [
        (f"{path}.{n}", type(f.default)) for n, f in kind.model_fields.items() if isinstance(f.default, BaseModel)
    ]
    below = [part for name, section_kind in deeper for part in of_section(name, section_kind)]
    return [heading + table(("setting", "kind", "default", "meaning"), rows), *below]


def row(name: str, field: FieldInfo, dashes: str) -> Row:
    """The row of one setting or argument."""
    called = field.alias or name
    flag = dashes + called.replace("_", "-") if dashes else called
    shown = called.upper() if Positional in field.metadata else flag
    default = "required" if field.is_required() else "-" if field.default_factory else default_text(field.default)
    return f"`{shown}`", kind_of(field.annotation, field.metadata), default, field.description or ""


def default_text(value: Any) -> str:
    if value is None or value == ():
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return f"`{value}`"


def kind_of(annotation: Any, metadata: Any = ()) -> str:
    """The type in words, with its range."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind_of(inner[0], [*inner[1:], *metadata])
    if origin in (Union, UnionType):
        return kind_of(next(a for a in inner if a is not NoneType), metadata)
    if origin is Literal:
        return ", ".join(str(a) for a in inner)
    if origin in (tuple, list):
        return f"any of: {kind_of(inner[0])}"
    names = {int: "whole number", float: "number", str: "text", bool: "true, false", Path: "path"}
    return " ".join([names.get(annotation, getattr(annotation, "__name__", str(annotation))), *limits(metadata)])


def limits(metadata: Any) -> list[str]:
    """The range in words, from a FieldInfo or annotated types."""
    flat = [part for m in metadata for part in (m.metadata if isinstance(m, FieldInfo) else [m])]
    words = {Ge: ("ge", "from {}"), Gt: ("gt", "above {}"), Le: ("le", "to {}"), Lt: ("lt", "below {}")}
    found = [words[type(m)][1].format(f"{getattr(m, words[type(m)][0]):g}") for m in flat if type(m) in words]
    return [w for w in found if not w.startswith(("to 2.14748e+09", "below 9.22337e+18"))]


def table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def filled(text: str) -> str:
    """The page ``text`` with the tables between its marks."""
    for name, make in {"commands": commands, "arguments": arguments, "settings": settings}.items():
        before, rest = text.split(MARK.format(name))
        _, after = rest.split(MARK.format("end of " + name))
        text = f"{before}{MARK.format(name)}\n\n{make()}\n\n{MARK.format('end of ' + name)}{after}"
    return text


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]  # whatever the locale
    print(filled(PAGE.read_text(encoding="utf-8")), end="")
