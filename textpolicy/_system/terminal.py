"""The terminal: lines that fit it, and what happens when nobody reads them any more."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any, TextIO

from rich.cells import cell_len, set_cell_size

_USAGE = r"(?:[^']|'[^']*')* \["  # with [ARGUMENTS] outside quotes: read, not copied
_COMMAND = re.compile(rf"(?<=:) ((?!{_USAGE})(?:textpolicy|pip|uv|python) [a-z-].*)$")  # as sentences end with
_SHARE = 4  # a prompt keeps one column in so many beside a long completion


def columns(stream: TextIO | None = None) -> int | None:
    """Return how many columns the terminal has that ``stream``, or standard output, goes to; None for no terminal."""
    stream = stream or sys.stdout
    if stream is None or not stream.isatty():
        return None
    asked = os.environ.get("COLUMNS", "")
    return (int(asked) if asked.isdecimal() and len(asked) < 6 else os.get_terminal_size(stream.fileno()).columns) or 80


def say(text: str, indent: int = 2, stream: TextIO | None = None) -> None:
    """Print every line of ``text``, on a terminal broken between words and indented by so many columns."""
    width = columns(stream)
    print("\n".join(wrap(line, width, " " * indent) for line in text.split("\n")), file=stream)


def one_line(text: str) -> str:
    """Return ``text`` with codes in place of what would end the line, or act on the terminal: new lines, escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def counted(number: int, what: str) -> str:
    """Return "1 step" or "2 steps"."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def latest(number: int, what: str) -> str:
    """Return "the last step" or "the last 2 steps"."""
    return f"the last {what}" if number == 1 else f"the last {number} {what}s"


def wrap(text: str, width: int | None, indent: str = "") -> str:
    """Break ``text`` between words into lines of ``width`` columns, the later ones indented; None leaves it whole.

    A longer word, such as a path, and a command at the end stay whole on a line of their own, to be copied.
    """
    if width is None or cell_len(text) <= width:
        return text
    command = _COMMAND.search(text)
    words = text[: command.start() if command else None].lstrip(" ").split(" ") + ([command[1]] if command else [])
    lines = [" " * (len(text) - len(text.lstrip(" "))) + words[0]]
    for word in words[1:]:
        if cell_len(lines[-1]) + 1 + cell_len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(indent + word)
    return "\n".join(lines)


def example(prompt: str, text: str, end: str, width: int | None, start: str = "") -> str:
    """Return a prompt and its completion, escaped, in one line of ``width`` columns; None leaves it whole.

    The prompt is cut first, at its start, and then the completion at its end.
    """
    prompt, text = repr(prompt), repr(text)
    room = cell_len(prompt) + cell_len(text)
    if width is not None:
        room = max(2, width - cell_len(f"{start} -> {end}"))
    left = max(room - cell_len(text), min(cell_len(prompt), room // _SHARE))
    if cell_len(prompt) > left:
        kept = prompt[-max(left, 1) :]
        while cell_len(kept) >= max(left, 1):  # characters may be two columns wide
            kept = kept[1:]
        prompt = f"…{kept}"
    if cell_len(text) > (left := room - cell_len(prompt)):
        text = f"{set_cell_size(text, left - 1)}…"
    return f"{start}{prompt} -> {text}{end}"


def silence(stream: IO[str]) -> None:
    """Send ``stream`` nowhere, as it cannot be written to any more, so that nothing else fails by it."""
    with suppress(OSError, ValueError):  # a stream without a file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class Lasting:
    """The stream to a screen that may go away: from then on it takes everything and shows nothing."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream, self._gone = stream, False

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the stream, such as its encoding."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write ``text`` if it can be."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Show what was written if it can be."""
        self._try(self._stream.flush)

    def _try(self, call: Callable[[], object]) -> None:
        if self._gone:
            return
        try:
            call()
        except OSError:
            self._gone = True
            silence(self._stream)


def open_closed() -> None:
    """Open the null device as each standard stream that the caller closed, as by ``>&-``.

    Otherwise the next file would get its descriptor, and whatever a library prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor, and so this one
            os.set_inheritable(nowhere, True)  # processes that are started get it, too
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # and print(file=sys.stderr) would print on standard output
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def until_unread(command: Callable[[], int]) -> int:
    """Run ``command`` and return its exit code, unless what it prints cannot be written.

    Then it is 141, as of SIGPIPE, where the reader has gone away, and 2 with a sentence where the disk is full.
    Standard streams that are closed are opened to nowhere before.
    """
    open_closed()
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()
    except OSError as error:
        try:
            print(flush=True)  # a stream without a buffer has nothing left to flush
        except OSError:
            silence(sys.stdout)
        else:
            raise  # of another file
        if error.errno == errno.EPIPE:
            return 141
        print(f"textpolicy: the output cannot be written ({error.strerror}); make room for it", file=sys.stderr)
        return 2
