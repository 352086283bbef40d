"""The ``textpolicy`` command. Exit codes: 0 done, 1 a check failed, 2 the request cannot work."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError
from pydantic_settings import CliApp, CliPositionalArg, CliSettingsSource, SettingsError

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


class Source(Section):
    """What to ask: a trained run, or a model with or without an adapter."""

    run: Path | None = None
    """Folder of a run: its model, adapter and way of asking."""
    model: str | None = None
    """Built-in name, folder, .gguf file or hub id; instead of a run."""
    adapter: Path | None = None
    """Adapter folder for the model."""
    threads: Annotated[int, Field(ge=0)] = 0
    """BLAS threads on a Linux CPU; 0 leaves it to OpenBLAS."""


class GenerateArguments(Source):
    """Write a completion."""

    prompt: CliPositionalArg[str]
    """What to ask."""
    max_tokens: int = 256
    """Longest completion, in tokens."""
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this."""
    repetition_penalty: float = 1.0
    """Above 1, tokens already there become less likely."""
    seed: int = 0
    """Fixes what is drawn."""
    plain: bool = False
    """True asks as typed: without the worked examples of the run's task, or a chat template."""


def generate(arguments: list[str]) -> int:
    """Ask a model, or a trained run: textpolicy generate [--run RUN | --model NAME] PROMPT."""
    asked = parse(GenerateArguments, arguments, "generate")
    from .inference import generate as answer

    print(answer(asked))
    return 0


class EvalArguments(Source):
    """Measure accuracy on a task's problems, with a 95% interval."""

    task: str | None = None
    """The task; a run's own if not given."""
    split: Literal["test", "validation", "train"] = "test"
    """Which of its problems."""
    problems: Annotated[int, Field(ge=0)] = 0
    """Only the first so many; 0 for all."""
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    max_tokens: int | None = None
    """Longest completion, in tokens; a run's own if not given."""
    seed: int = 0
    """Fixes what is drawn."""
    show: Annotated[int, Field(ge=0)] = 5
    """Print so many completions."""


def evaluate(arguments: list[str]) -> int:
    """Measure accuracy: textpolicy eval [--run RUN | --model NAME --task TASK]."""
    asked = parse(EvalArguments, arguments, "eval")
    from .inference import evaluate as measure

    print(measure(asked))
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
    "generate": generate,
    "eval": evaluate,
    "validate": validate,
    "algorithms": algorithms,
    "tasks": tasks,
}
