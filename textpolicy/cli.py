"""The ``textpolicy`` command. Exit codes: 0 done, 1 a check failed, 2 the request cannot work."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_settings import CliApp, CliSettingsSource, SettingsError

from .config import Section, explain, read_values
from .errors import TextPolicyError, UserError

Arguments = TypeVar("Arguments", bound=BaseModel)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; a request that cannot work is one sentence on stderr and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments.pop(0) if arguments else "validate"
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(f"textpolicy {_version()}")
        return 0
    if name not in COMMANDS:
        return _refuse(f"there is no command {name!r}; run 'textpolicy --help' for the list")
    try:
        return COMMANDS[name](arguments)
    except TextPolicyError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "textpolicy":
            raise
        return _refuse(f"the package {error.name!r} is not installed; install it with: pip install 'textpolicy[mlx]'")
    except KeyboardInterrupt:
        print("textpolicy: stopped by Ctrl-C", file=sys.stderr)
        return 130


def _refuse(sentence: str) -> int:
    print(f"textpolicy: {sentence}", file=sys.stderr)
    return 2


def _usage() -> str:
    lines = [f"  {name:<10} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: textpolicy COMMAND [ARGUMENTS]",
            "",
            "Reinforcement learning for text generation, on your own machine.",
            "",
            *lines,
            "",
            "'textpolicy COMMAND --help' describes one.",
        ]
    )


def _version() -> str:
    from importlib.metadata import version

    return version("textpolicy")


def parse(kind: type[Arguments], arguments: list[str], command: str, **defaults: Any) -> Arguments:
    """The ``arguments`` as a ``kind``; flags override ``defaults``. Every mistake is one sentence."""
    source: CliSettingsSource[Any] = CliSettingsSource(
        kind,  # type: ignore[arg-type]  # any model will do, and CliApp says so
        cli_prog_name=f"textpolicy {command}",
        cli_kebab_case=True,
        cli_exit_on_error=False,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_implicit_flags=True,
    )
    try:
        return CliApp.run(kind, cli_args=arguments, cli_settings_source=source, **defaults)
    except ValidationError as error:
        raise UserError("; ".join(explain(error, kind))) from error
    except SettingsError as error:
        raise UserError(_unrecognised(str(error), source)) from error


def _unrecognised(message: str, source: CliSettingsSource[Any]) -> str:
    """argparse's words, with the flag that was probably meant."""
    flags = list(source.root_parser._option_string_actions)
    unknown = next((word for word in message.split() if word.startswith("--")), "")
    near = difflib.get_close_matches(unknown.split("=")[0], flags, n=1)
    return message.removeprefix("error parsing CLI: ") + (f"; did you mean {near[0]}?" if near else "")


def train(arguments: list[str]) -> int:
    """Train a model: textpolicy train [CONFIG.toml] [--flags]."""
    from .config import Config, check_config

    values: dict[str, Any] = {}
    if arguments and not arguments[0].startswith("-"):
        path = Path(arguments.pop(0))
        values = read_values(path)
        check_config(values, str(path))
    config = parse(Config, arguments, "train [CONFIG.toml]", **values)
    from .run import run

    run(config)
    return 0


def ask(arguments: list[str]) -> int:
    """Ask a model, or a trained run: textpolicy generate [--run RUN | --model NAME] PROMPT."""
    from .inference import GenerateArguments, generate

    print(generate(parse(GenerateArguments, arguments, "generate")))
    return 0


def measure(arguments: list[str]) -> int:
    """Measure accuracy: textpolicy eval [--run RUN | --model NAME --task TASK]."""
    from .inference import EvalArguments, evaluate

    print(evaluate(parse(EvalArguments, arguments, "eval")))
    return 0


def validate(arguments: list[str]) -> int:
    """Check this installation: textpolicy validate [--json]."""
    from .validate import main as check

    return check(arguments)


def algorithms(arguments: list[str]) -> int:
    """List the algorithms."""
    from .algorithms import ALGORITHMS

    parse(Section, arguments, "algorithms")
    for name, recipe in ALGORITHMS.items():
        how = recipe.surrogate
        baseline = getattr(recipe.baseline, "__name__", str(recipe.baseline))
        print(
            f"{name:<10} baseline {baseline:<12} ratio {how.ratio:<9} "
            f"clip -{how.clip_low:g}/+{how.clip_high:g}  normalise {recipe.normalize:<9} {recipe.paper}"
        )
    return 0


def tasks(arguments: list[str]) -> int:
    """List the tasks."""
    from .tasks import TASKS, load_task

    parse(Section, arguments, "tasks")
    for name in TASKS:
        task = load_task(name)
        sizes = f"{len(task.train)} training, {len(task.validation)} validation, {len(task.test)} test problems"
        print(f"{name:<10} {task.summary} ({sizes})")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "generate": ask,
    "eval": measure,
    "validate": validate,
    "algorithms": algorithms,
    "tasks": tasks,
}
