"""Parse command-line arguments into settings; every mistake is reported in one sentence."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_settings import CliApp, CliSettingsSource, SettingsError

from ..errors import UserError
from .settings import explain, untrainable

Arguments = TypeVar("Arguments", bound=BaseModel)


def parse(
    kind: type[Arguments], arguments: list[str], command: str, *, program: str = "textpolicy", **defaults: Any
) -> Arguments:
    """Return the ``arguments`` as a ``kind``; flags override ``defaults``. Raises UserError for a mistake."""
    source: CliSettingsSource[Any] = CliSettingsSource(
        kind,  # type: ignore[arg-type]  # any model will do, as the types of CliApp say
        cli_prog_name=f"{program} {command}".strip(),
        cli_kebab_case=True,
        cli_exit_on_error=False,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_implicit_flags=True,
    )
    try:
        parsed = CliApp.run(kind, cli_args=arguments, cli_settings_source=source, **defaults)
    except ValidationError as error:
        raise UserError("; ".join(explain(error, kind))) from error
    except SettingsError as error:  # argparse's message; add the flag that was probably meant, or why there is none
        message = str(error).removeprefix("error parsing CLI: ")
        if table := re.match(r"Parsing error encountered for (\S+):", message):
            raise UserError(f"{table[1]} cannot be read; write NAME=VALUE,NAME=VALUE or a JSON object") from error
        unknown = next((word for word in message.split() if word.startswith("--")), "").split("=")[0]
        options = list(source.root_parser._option_string_actions)
        flags = [flag for flag in options if not any(other.startswith(f"{flag}.") for other in options)]  # no sections
        near = [flag for flag in difflib.get_close_matches(unknown, flags, n=1) if flag not in message]
        hint = untrainable(unknown.rpartition(".")[2].replace("-", "_"))
        hint = hint or (f"did you mean {near[0]}?" if near else "")
        raise UserError(f"{message}; {hint}" if hint else message) from error
    _forget_defaults(parsed, [tuple(flag.split(".")) for flag in source.env_vars], defaults)
    return parsed


def _forget_defaults(section: BaseModel, flags: Sequence[tuple[str, ...]], values: Mapping[str, Any]) -> None:
    """Remove from ``model_fields_set`` what no flag or value set: one flag of a section sets all defaults in it."""
    for name, value in section:
        inside, given = [flag[1:] for flag in flags if flag[0] == name], values.get(name)
        if not inside and name not in values:
            section.model_fields_set.discard(name)
        elif isinstance(value, BaseModel) and () not in inside:
            _forget_defaults(value, inside, given if isinstance(given, Mapping) else {})
