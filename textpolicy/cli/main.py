"""The ``textpolicy`` command. Exit codes: 0 done, 1 a check failed, 2 an invalid request, 130, 141 and 143 a signal."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from .._system.faults import machine_fault
from .._system.files import local_path
from .._system.machine import how_to_install
from .._system.terminal import one_line, say, until_unread
from ..config.flags import checked, parse, read
from ..config.settings import LocalPath, Positional, Section, check_config, merged, read_values
from ..errors import StoppedError, TextPolicyError
from ..validate import main as validate


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code; an invalid request prints one sentence on stderr."""
    return until_unread(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _run(arguments: list[str]) -> int:
    name = arguments.pop(0) if arguments else "validate"
    if name in ("-h", "--help"):
        print("usage: textpolicy COMMAND [ARGUMENTS]\n")
        print("Reinforcement learning for text generation, on your own machine.\n")
        for name, (_, meaning) in COMMANDS.items():
            say(f"  {name:<14} {meaning}", 17)
        print("\n'textpolicy COMMAND --help' describes one.")
        return 0
    if name == "--version":
        print(f"textpolicy {version('textpolicy')}")
        return 0
    code = 2
    try:
        os.getcwd()
    except OSError:  # libraries that the commands import ask for it, too
        say("textpolicy: the folder that this is run in is gone; go to another, and run it there", stream=sys.stderr)
        return code
    try:
        if name in COMMANDS:
            return COMMANDS[name][0](arguments)
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        message = f"there is no command {name!r}; {hint}run 'textpolicy --help' for the list"
    except StoppedError as error:
        message, code = str(error), error.exit_code
    except TextPolicyError as error:
        message = str(error)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "textpolicy":
            raise
        message = f"the package {error.name!r} is not installed; {how_to_install('textpolicy[mlx]')}"
    except (MemoryError, RuntimeError) as error:
        if (fault := machine_fault(error)) is None:
            raise
        message = fault
    except OSError as error:
        if error.filename is None:
            raise
        message = f"{error.filename!r} cannot be used ({error.strerror}); check the path"
    except KeyboardInterrupt:
        message, code = "stopped by Ctrl-C", 130
    if message:
        say(f"textpolicy: {one_line(message)}", stream=sys.stderr)
    return code


def train(arguments: list[str]) -> int:
    """Train a model, or resume a run."""
    from ..devices.launch import launched
    from ..run.resume import TrainArguments, saved_values

    given = read(TrainArguments, arguments, "train")
    values: dict[str, Any] = {}
    if "config_file" in given:
        values = read_values(Path(local_path(given["config_file"])))
        check_config(values, given["config_file"])
    elif "resume" in given:
        folder = Path(local_path(given["resume"]))
        values = saved_values(folder) if folder.exists() or not launched() else {}  # rank 0 tells the others
    args = checked(TrainArguments, merged(values, given))
    if args.dry_run:
        from ..run.assembly import price

        print("\n".join(price(args.config, args.expected_tokens)))
        return 0
    from ..run.training_run import run

    run(args.config, args.allow)
    return 0


def generate(arguments: list[str]) -> int:
    """Print a completion."""
    from ..run import inference

    print(inference.generate(parse(inference.GenerateArguments, arguments, "generate")))
    return 0


def evaluate(arguments: list[str]) -> int:
    """Print the accuracy of a model."""
    from ..run import inference

    say(inference.evaluate(parse(inference.EvalArguments, arguments, "eval")))
    return 0


def export(arguments: list[str]) -> int:
    """Write a trained run for other programs."""
    from ..run import export as exporting

    say(exporting.export(parse(exporting.ExportArguments, arguments, "export")))
    return 0


def view(arguments: list[str]) -> int:
    """Serve the page of one run or two."""
    from ..report.view import server

    server.view(parse(server.ViewArguments, arguments, "view"))
    return 0


def report(arguments: list[str]) -> int:
    """Write the report and print its path."""
    from ..record import layout
    from ..report.page import ReportArguments, write_report

    args = parse(ReportArguments, arguments, "report")
    path = args.out or args.runs[0] / layout.REPORT
    write_report(args.runs, path)
    print(path)
    return 0


class DoctorArguments(Section):
    """Say what is wrong with a run, and what to change; exit code 1 if anything is."""

    run: Annotated[LocalPath, Positional]
    """Folder of the run, finished or not."""
    as_json: bool = Field(False, alias="json")
    """Print JSON, for a program to read."""


def doctor(arguments: list[str]) -> int:
    """Print what the doctor finds; return 1 if that is anything."""
    from ..doctor import examine
    from ..doctor.words import as_json, full

    args = parse(DoctorArguments, arguments, "doctor")
    report = examine(args.run)
    print(as_json(report) if args.as_json else full(report, str(args.run)))
    return 1 if report.findings else 0


class AlgorithmsArguments(Section):
    """List the algorithms, or show one of them in full."""

    name: Annotated[str | None, Positional] = None
    """The algorithm to show; a list of all if not given."""


def algorithms(arguments: list[str]) -> int:
    """Print the algorithms, or one of them."""
    from ..algorithms import ALGORITHMS, algorithm
    from .describe import describe

    args = parse(AlgorithmsArguments, arguments, "algorithms")
    if args.name is not None:
        say(describe(args.name, algorithm(args.name)))
        return 0
    for name, recipe in ALGORITHMS.items():
        say(f"{name:<21} {recipe.summary} ({recipe.paper})", 22)
    say("\n'textpolicy algorithms NAME' shows one in full; docs/algorithms.md explains them all.")
    return 0


class TasksArguments(Section):
    """List the tasks, or show one of them with some of its problems."""

    name: Annotated[str | None, Positional] = None
    """The task to show; a list of all if not given."""
    show: Annotated[int, Field(ge=0)] = 0
    """Number of its training problems to print, as the model gets them."""


def tasks(arguments: list[str]) -> int:
    """Print the tasks, or one of them."""
    from ..tasks import MEANINGS, REASONING_GYM, TASKS, load_task

    args = parse(TasksArguments, arguments, "tasks")
    if args.name is None:
        any_of = REASONING_GYM + "NAME"
        meanings = {**MEANINGS, any_of: "Any data set of reasoning-gym, by its name (textpolicy[reasoning-gym])."}
        width = max(map(len, [*TASKS, any_of]))
        for name in [*TASKS, any_of]:
            say(f"{name:<{width}}  {meanings.get(name, '')}".rstrip(), width + 2)
        print("\n'textpolicy tasks NAME --show 3' prints problems of one.")
        return 0
    task = load_task(args.name)
    sizes = f"{len(task.train)} training, {len(task.validation)} validation, {len(task.test)} test problems"
    say(f"{args.name}: {task.summary} ({sizes})")
    if task.tools:
        print(f"tools: {', '.join(tool.__name__ for tool in task.tools)}")
    for n, problem in enumerate(task.train[: args.show], 1):
        answer = f"whose answer is {problem.answer}" if problem.answer not in ("", None) else "without an answer"
        print(f"\n-- problem {n}, {answer}")
        for message in task.prompt(problem.question):
            print(f"{message['role']}: {message['content']}")
    return 0


def serve(arguments: list[str]) -> int:
    """Serve the Tinker API, and OpenAI's, until a signal."""
    from ..serve import command

    command.serve(parse(command.ServeArguments, arguments, "serve"))
    return 0


def tinker_server(arguments: list[str]) -> int:
    """Serve as ``serve`` does, by its older name."""
    from ..serve import command

    older = parse(command.TinkerServerArguments, arguments, "tinker-server")
    given = older.model_dump(exclude={"model"}) | {"models": older.models or (older.model,)}
    command.serve(command.ServeArguments(**given))
    return 0


def campaign(arguments: list[str]) -> int:
    """Run a subcommand of campaigns."""
    from .campaign import main as command

    return command(arguments)


Command = Callable[[list[str]], int]
COMMANDS: dict[str, tuple[Command, str]] = {  # with the line of --help: python -OO has no docstrings
    "train": (train, "Train a model: textpolicy train [CONFIG.toml] [--resume RUN] [--flags]."),
    "generate": (
        generate,
        "Ask a model, or a trained run: textpolicy generate [--run RUN | --adapter RUN | --model NAME] PROMPT.",
    ),
    "eval": (evaluate, "Measure accuracy: textpolicy eval [--run RUN | --adapter RUN | --model NAME --task TASK]."),
    "view": (
        view,
        "Browse the completions of a run or of a folder of runs on a local page: textpolicy view RUN [RUN].",
    ),
    "report": (
        report,
        "Write one run, or several side by side, as an HTML file: textpolicy report RUN [RUN ...] [--out FILE].",
    ),
    "export": (export, "Take a trained run elsewhere: textpolicy export RUN --to mlx|hf|peft|gguf [--out PATH]."),
    "doctor": (doctor, "Say what is wrong with a run, and what to change: textpolicy doctor RUN [--json]."),
    "validate": (validate, "Check this installation: textpolicy validate [--train] [--json]."),
    "algorithms": (algorithms, "List the algorithms, or show one: textpolicy algorithms [NAME]."),
    "tasks": (tasks, "List the tasks, or show problems of one: textpolicy tasks [NAME [--show N]]."),
    "serve": (serve, "Serve models to Tinker programs and as OpenAI's API: textpolicy serve MODEL [MODEL ...]."),
    "tinker-server": (tinker_server, "The older name of serve: textpolicy tinker-server [--model NAME] [--port PORT]."),
    "campaign": (campaign, "Plan, run and judge arms x seeds: textpolicy campaign plan|run|status|analyze|report."),
}
