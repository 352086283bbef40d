"""The tasks of users: a function in a Python file, "FILE.py:FUNCTION", or rows of data."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from .._system.files import of_a_checkout
from ..environment.rows import Rows, prompt_of, rows_of
from ..environment.text.conversation import as_messages
from ..errors import UserError, unknown_name
from ..rewards.contract import RewardFunction
from ..rewards.example import REFERENCES, missing
from .base import Message, Problem, Task
from .splits import Splits, question_key

DEFAULT = "task"  # the function, if the name is a file alone
ANSWER = "answer"  # the column of answers, unless it is named


def task_from_rows(
    rows: Rows,
    reward: RewardFunction,
    *,
    question: str = "question",
    answer: str = "answer",
    prompt: Callable[[Any], list[Message]] | None = None,
    name: str = "rows",
    max_tokens: int | None = None,
    tools: Sequence[Callable[..., Any]] = (),
) -> Task:
    """Return a task whose problems are ``rows``: mappings, or a .jsonl, .csv or .parquet file of them.

    ``question`` names the column of questions, texts or lists of chat messages, and ``answer`` that of answers; a
    missing cell (None, NaN) is the answer "". The reward gets the row as ``example``, in which "question" and "answer"
    are the named columns. A column named by ``answer`` is the only one of REFERENCES there: what the row has besides in
    columns of those names, or of the name "question", is in example["row"], the row as it was. ``prompt``
    turns a question into chat messages, by default a text into a user's message. Of rows with the same question the
    first is kept, and spellings of one question (``question_key``) are in one split. A fifth of the questions, at most
    200, is the test split and a tenth, at most 100, the validation split, whatever the seed of a run. Raises UserError.
    """
    source = f"{rows}" if isinstance(rows, str | Path) else "the rows"
    read = rows_of(rows)
    if answer != ANSWER and read and not any(answer in row for row in read):
        raise unknown_name(f"column of answers in {source} called", answer, map(str, read[0]))
    taken = {name for name in REFERENCES if answer not in (ANSWER, name)} | ({"question"} - {question})
    problems = []
    for number, row in enumerate(read, 1):
        solution = "" if missing(row.get(answer)) else row[answer]
        others = {column: cell for column, cell in row.items() if column not in taken}
        hidden = {"row": row} if len(others) < len(row) else {}
        problems.append(Problem(prompt_of(row, question, number, source), solution, {**hidden, **others}))
    splits = Splits.drawn(problems, source)
    return Task(
        name=name,
        summary=f"{len(read)} rows",
        train=splits.train,
        validation=splits.validation,
        test=splits.test,
        prompt=prompt or as_messages,
        reward=reward,
        tools=tuple(tools),
        max_tokens=max_tokens,
    )


# ---- a function in a file


def task_file(name: str) -> tuple[Path, str] | None:
    """Return the file and function of a ``name`` like "FILE.py:FUNCTION" or "FILE.py"; None for another name."""
    path, separator, function = name.rpartition(":")
    if separator and path.endswith(".py"):
        return Path(path), function
    return (Path(name), DEFAULT) if name.endswith(".py") else None


def short_name(name: str) -> str:
    """Return the name of a task for a folder: that of a file without its folder, ending and default function."""
    named = task_file(name)
    if named is None:
        return name
    path, function = named
    return path.stem if function == DEFAULT else f"{path.stem}-{function}"


def own_task(path: Path, function: str) -> Task:
    """Return the task that ``function`` of the Python file ``path`` returns; the file can import its neighbours.

    Raises UserError.
    """
    task = _returned(path, function)
    if not isinstance(task, Task):
        raise UserError(f"{function}() of {path} returned a {type(task).__name__}; return a textpolicy.tasks.Task")
    places: dict[str, str] = {}  # of the questions, in whatever spelling
    for name, problems in {"train": task.train, "validation": task.validation, "test": task.test}.items():
        if not problems:
            raise UserError(f"the task of {path} has no problems in its {name} split; give it at least one")
        for problem in problems:
            if places.setdefault(question_key(problem.question), name) != name:
                raise UserError(f"{problem.question!r:.80} is in two splits of the task of {path}; keep it in one")
    return task


def named_rows(name: str) -> list[dict[str, Any]]:
    """Return the rows of a file, or those that a function of a Python file, "FILE.py:FUNCTION", returns.

    Raises UserError.
    """
    own = task_file(name)
    return rows_of(name) if own is None else rows_of(_returned(*own))


def _returned(path: Path, function: str) -> Any:
    """Return what ``function`` of the Python file ``path`` returns. Raises UserError."""
    module = _imported(path)
    made = getattr(module, function, None)
    if not callable(made):
        own = [k for k, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise unknown_name(f"function in {path} called", function, own or ["(it defines none)"])
    try:
        return made()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{function}() of {path} raised {_described(error, path)}; fix it") from error


def _imported(path: Path) -> ModuleType:
    """Import the file as the module of its name, so that worker processes can import it too."""
    if not path.is_file():
        raise UserError(
            f"there is no file {path} with the task; check the path, which is relative to the current folder"
            f"{of_a_checkout(path)}"
        )
    file, name = path.resolve(), path.stem
    if (loaded := sys.modules.get(name)) is not None:
        if Path(getattr(loaded, "__file__", None) or "").resolve() != file:
            raise UserError(f"the file {path} has the name of another module, {name}; rename it")
        return loaded
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    spec = None if "." in name else importlib.util.find_spec(name)
    if spec is None or Path(spec.origin or "").resolve() != file:
        raise UserError(f"the file {path} cannot be imported as {name!r}; give it a name that no other module has")
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise UserError(f"{path} raised {_described(error, path)}; fix it") from error


def _described(error: Exception, path: Path) -> str:
    """Return the error with the line of ``path`` that it comes from."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path.resolve()]
    at = f" in line {lines[-1]}" if lines else ""
    return f"{type(error).__name__}{at} ({' '.join(str(error).split())})"
