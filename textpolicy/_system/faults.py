"""Turn errors of the disk, of memory and of the GPU into a UserError that says how to resume."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError

TRAIN_MATH = "train_math.json"  # the settings of a run of textpolicy.tinker.train_math, in its folder
# The words of MLX's errors: on a CPU, CUDA and Metal; where Metal counts buffers; and where macOS ends the GPU's work.
_NO_MEMORY, _TOO_MANY = ("alloc]", "out of memory", "Insufficient Memory"), "Resource limit ("
_NOT_BUILT = ("filesystem error", "Failed to execute command", "[Compile::eval_cpu]")  # where it builds a function
_GPU_ENDED, _TOO_LONG = "[METAL] Command buffer", ("Interactivity", "Timeout")


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
        if (what := machine_fault(error)) is None:
            raise
        allow = " --allow machine" if "machine." in what else ""
        raise UserError(f"{what}, and resume with: {how_to_resume(folder)}{allow}") from error


def machine_fault(error: BaseException) -> str | None:
    """Return what ended the machine's work, and what to do about it; None for an error of another kind.

    MLX computes nothing more in this process after an error of the GPU, so the process should end.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if not isinstance(error, MemoryError | RuntimeError):
        return None
    if _TOO_MANY in text:  # it also says malloc
        return f"MLX holds more buffers than Metal allows ({text}); a new process begins without them"
    if isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY):
        return (
            f"memory ran out ({text}); lower machine.micro_batch_tokens or machine.decode_rows, or set "
            "machine.memory_limit_gb below what is free"
        )
    if any(words in text for words in _NOT_BUILT):
        return (
            f"MLX could not build a function ({text[:200]}); set TMPDIR to a folder that can be written to, with room"
        )
    if _GPU_ENDED not in text:
        return None
    if any(words in text for words in _TOO_LONG):
        return (
            f"macOS ended work of the GPU that kept the display waiting ({text}); let the display sleep (caffeinate -s "
            "keeps the Mac awake meanwhile), or close what draws on it"
        )
    return f"the GPU gave up ({text}); update macOS if it does so again"
