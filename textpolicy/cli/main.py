"""The ``textpolicy`` command. Exit codes: 0 done, 1 a check failed, 2 the request cannot work, 130 and 143 a signal."""

from __future__ import annotations

import difflib
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field
from pydantic_settings import CliPositionalArg

from ..config.flags import parse
from ..config.settings import AlgorithmSettings, Section, read_values
from ..errors import StoppedError, TextPolicyError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..algorithms import Algorithm
    from .describe import Setting


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
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return _refuse(f"there is no command {name!r}; {hint}run 'textpolicy --help' for the list")
    try:
        return COMMANDS[name](arguments)
    except StoppedError as error:
        _refuse(str(error))
        return error.exit_code
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
    lines = [f"  {name:<13} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
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


def train(arguments: list[str]) -> int:
    """Train a model: textpolicy train [CONFIG.toml] [--resume RUN] [--flags]."""
    from ..config.settings import check_config
    from ..run.resume import TrainArguments, run_to_resume, saved_values

    values: dict[str, Any] = {}
    resume = run_to_resume(arguments)
    if arguments and not arguments[0].startswith("-"):
        path = Path(arguments.pop(0))
        values = read_values(path)
        check_config(values, str(path))
    elif resume is not None:
        values = saved_values(resume)
    asked = parse(TrainArguments, arguments, "train [CONFIG.toml]", **values)
    if asked.dry_run:
        from ..run.assembly import price

        print("\n".join(price(asked.config, asked.expected_tokens)))
        return 0
    from ..run.training_run import run

    run(asked.config, asked.allow)
    return 0


def ask(arguments: list[str]) -> int:
    """Ask a model, or a trained run: textpolicy generate [--run RUN | --adapter RUN | --model NAME] PROMPT."""
    from ..run.inference import GenerateArguments, generate

    print(generate(parse(GenerateArguments, arguments, "generate")))
    return 0


def measure(arguments: list[str]) -> int:
    """Measure accuracy: textpolicy eval [--run RUN | --adapter RUN | --model NAME --task TASK]."""
    from ..run.inference import EvalArguments, evaluate

    print(evaluate(parse(EvalArguments, arguments, "eval")))
    return 0


def leave(arguments: list[str]) -> int:
    """Take a trained run elsewhere: textpolicy export RUN --to mlx|hf|peft|gguf [--out PATH]."""
    from ..run.export import ExportArguments, export

    print(export(parse(ExportArguments, arguments, "export")))
    return 0


def view(arguments: list[str]) -> int:
    """Browse a run's completions, or compare two runs, on a local page: textpolicy view RUN [RUN]."""
    from ..report.view.server import ViewArguments
    from ..report.view.server import view as serve

    serve(parse(ViewArguments, arguments, "view"))
    return 0


def tell(arguments: list[str]) -> int:
    """Write one run, or several side by side, as an HTML file: textpolicy report RUN [RUN ...] [--out FILE]."""
    from ..report.page import ReportArguments, report

    print(report(parse(ReportArguments, arguments, "report")))
    return 0


class DoctorArguments(Section):
    """Say what is wrong with a run, and what to change; exit code 1 if anything is."""

    run: CliPositionalArg[Path]
    """Folder of the run, finished or not."""
    as_json: bool = Field(False, alias="json")
    """Print JSON, for a program to read."""


def doctor(arguments: list[str]) -> int:
    """Say what is wrong with a run, and what to change: textpolicy doctor RUN [--json]."""
    from ..doctor import examine
    from ..doctor.words import as_json, full

    asked = parse(DoctorArguments, arguments, "doctor")
    report = examine(asked.run)
    print(as_json(report) if asked.as_json else full(report, str(asked.run)))
    return 1 if report.findings else 0


def validate(arguments: list[str]) -> int:
    """Check this installation: textpolicy validate [--json]."""
    from ..validate import main as check

    return check(arguments)


_UNBROKEN = 1000  # columns: what is piped has one line per row
_WIDTHS = (20, 15, 11, 9, 13, 14, 10)  # of the table of algorithms, for a terminal; 98 with the gaps


class AlgorithmsArguments(Section):
    """List the algorithms, or show one of them in full."""

    name: CliPositionalArg[str | None] = None
    """The algorithm to show; all of them in a table if not given."""


def algorithms(arguments: list[str]) -> int:
    """List the algorithms, or show one: textpolicy algorithms [NAME]."""
    from rich.console import Console

    name = parse(AlgorithmsArguments, arguments, "algorithms").name
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _UNBROKEN
    if name is None:
        _list_algorithms(console)
    else:
        _show_algorithm(name, console)
    return 0


def _list_algorithms(console: Console) -> None:
    from dataclasses import astuple, fields

    from ..algorithms import ALGORITHMS
    from .describe import Overview, overview

    table = _columns(gap=1 if console.is_terminal else 2)
    for field in fields(Overview):
        table.add_column(field.name, overflow="fold")
    for name, recipe in ALGORITHMS.items():
        cells = zip(astuple(overview(name, recipe)), _WIDTHS, strict=True)
        table.add_row(*(_cell(text, width, console) for text, width in cells))
    console.print(table)
    if console.is_terminal:
        console.print("\n'textpolicy algorithms NAME' shows one in full; docs/algorithms.md explains them all.")


def _cell(text: str, width: int, console: Console) -> Text:
    """On a terminal lines of at most ``width``, broken behind hyphens too, which tables do at spaces alone."""
    from rich.text import Text

    return Text("\n".join(textwrap.wrap(text, width)) if console.is_terminal else text)


def _show_algorithm(name: str, console: Console) -> None:
    from rich.text import Text

    from ..algorithms import algorithm
    from .describe import example

    recipe, known = algorithm(name), _algorithm_settings()
    console.print(Text(f"{name}: {recipe.summary}\n", "bold"))
    console.print(_pipeline(recipe))
    console.print("\nWhat changes it; a TOML file has the same names under \\[algorithm], with _ for -:\n")
    console.print(_settings(recipe, known, console))
    console.print(f"\nexample: {example(name, recipe, known)}", soft_wrap=True)


def _pipeline(recipe: Algorithm) -> Table:
    from rich.text import Text

    from .describe import parts

    table = _columns()
    table.show_header = False
    table.add_row("source", Text(recipe.paper))
    for part in parts(recipe):
        table.add_row(part.role, Text("\n".join(filter(None, [f"{part.name}: {part.formula}", part.values]))))
    return table


def _settings(recipe: Algorithm, known: list[Setting], console: Console) -> Table:
    from rich.text import Text

    from .describe import settings_of, shown

    table = _columns()
    for heading in ("flag", "value", "meaning"):
        table.add_column(heading)
    for setting in settings_of(recipe, known):
        table.add_row(setting.flag, _cell(shown(setting.value), 15, console), Text(setting.meaning))
    return table


def _columns(gap: int = 2) -> Table:
    """A table without lines, its columns ``gap`` spaces apart."""
    from rich.table import Table

    return Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")


def _algorithm_settings(section: type[BaseModel] = AlgorithmSettings, above: str = "") -> list[Setting]:
    """Everything under [algorithm] but the name, with its default and meaning."""
    from .describe import Setting

    found = []
    for name, field in section.model_fields.items():
        if isinstance(field.default, BaseModel):
            found += _algorithm_settings(type(field.default), f"{above}{name}.")
        elif name != "name":
            found.append(Setting(above + name, field.default, field.description or ""))
    return found


class TasksArguments(Section):
    """List the tasks, or show one of them with some of its problems."""

    name: CliPositionalArg[str | None] = None
    """The task to show; all of them in a list if not given."""
    show: Annotated[int, Field(ge=0)] = 0
    """Print so many of its training problems, as the model gets them."""


def tasks(arguments: list[str]) -> int:
    """List the tasks, or show problems of one: textpolicy tasks [NAME [--show N]]."""
    from ..tasks import REASONING_GYM, TASKS

    asked = parse(TasksArguments, arguments, "tasks")
    if asked.name is not None:
        print("\n".join(_task_lines(asked.name, asked.show)))
        return 0
    for name, loader in TASKS.items():
        print(f"{name:<16} {(loader.__doc__ or '').splitlines()[0]}")
    print(f"{REASONING_GYM + 'NAME':<16} Any data set of reasoning-gym, by its name (textpolicy[reasoning-gym]).")
    print("\n'textpolicy tasks NAME --show 3' prints problems of one.")
    return 0


def _task_lines(name: str, show: int) -> list[str]:
    from ..tasks import load_task

    task = load_task(name)
    sizes = f"{len(task.train)} training, {len(task.validation)} validation, {len(task.test)} test problems"
    lines = [f"{name}: {task.summary} ({sizes})"]
    lines += [f"tools: {', '.join(tool.__name__ for tool in task.tools)}"] if task.tools else []
    for n, problem in enumerate(task.train[:show], 1):
        lines += [
            "",
            f"-- problem {n}, " + (f"whose answer is {problem.answer}" if problem.answer else "without an answer"),
        ]
        lines += [f"{m['role']}: {m['content']}" for m in task.prompt(problem.question)]
    return lines


def serve(arguments: list[str]) -> int:
    """Start a Tinker server on this machine: textpolicy tinker-server [--model NAME] [--port PORT]."""
    from .tinker_server import ServerArguments
    from .tinker_server import serve as start

    start(parse(ServerArguments, arguments, "tinker-server"))
    return 0


def campaign(arguments: list[str]) -> int:
    """Plan, run and judge arms x seeds: textpolicy campaign plan|run|status|analyze|report."""
    from .campaign import main as command

    return command(arguments)


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train,
    "generate": ask,
    "eval": measure,
    "view": view,
    "report": tell,
    "export": leave,
    "doctor": doctor,
    "validate": validate,
    "algorithms": algorithms,
    "tasks": tasks,
    "tinker-server": serve,
    "campaign": campaign,
}
