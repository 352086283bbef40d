"""Turn disk-full and out-of-memory errors into a UserError that says how to resume."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError

TRAIN_MATH = "train_math.json"  # the settings of a run of textpolicy.tinker.train_math, in its folder
_NO_MEMORY = ("alloc]", "out of memory", "Insufficient Memory")  # in MLX's errors on a CPU, on CUDA and on Metal


def how_to_resume(folder: Path) -> str:
    """Return the command that resumes the run in ``folder``."""
    path = shlex.quote(str(folder))
    if (folder / TRAIN_MATH).exists():
        return f"python -m textpolicy.tinker.train_math --resume --log-dir {path}"
    return f"textpolicy train --resume {path}"


@contextmanager
def resumable_errors(folder: Path) -> Iterator[None]:
    """Turn an error of the disk, or of memory, into a UserError that says how to resume the run in ``folder``."""
    try:
        yield
    except (ConnectionError, TimeoutError):
        raise
    except OSError as error:
        where = f": {error.filename}" if error.filename is not None else ""
        raise UserError(
            f"the run in {folder} cannot write or read its files ({error.strerror or error}{where}); "
            f"fix that and resume with: {how_to_resume(folder)}"
        ) from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in _NO_MEMORY):
            raise
        raise UserError(
            f"memory ran out ({str(error).strip() or 'MemoryError'}); lower machine.micro_batch_tokens or "
            f"machine.decode_rows, or set machine.memory_limit_gb below what is free, and resume with: "
            f"{how_to_resume(folder)} --allow machine"
        ) from error
