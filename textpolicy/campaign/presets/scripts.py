"""The way from a script's words to its settings: as every command's, and lists may also stand word by word."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from ...config.flags import parse
from ...config.settings import Section
from ...errors import TextPolicyError

Arguments = TypeVar("Arguments", bound=Section)


def script(
    name: str, kind: type[Arguments], run: Callable[[Arguments], int], lists: Sequence[str], argv: Sequence[str]
) -> int:
    """Run one script; a request that cannot work is one sentence on stderr and exit code 2."""
    try:
        return run(parse(kind, joined(argv, lists), "", program=name))
    except TextPolicyError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: stopped by Ctrl-C; the same command goes on", file=sys.stderr)
        return 130


def joined(argv: Sequence[str], lists: Sequence[str]) -> list[str]:
    """``--seeds 1 2 3`` as ``--seeds=1,2,3``, for the flags named in ``lists``."""
    words: list[str] = []
    for word in argv:
        if words and words[-1].split("=")[0] in lists and not word.startswith("-"):
            words[-1] += ("," if "=" in words[-1] else "=") + word
        else:
            words.append(word)
    return words
