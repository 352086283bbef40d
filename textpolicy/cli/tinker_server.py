"""The models of the other Tinker server, SkyRL's, which ``tinker/server/`` starts for comparison."""

from __future__ import annotations

from pathlib import Path

from .._system.cache import cache_folder
from .._system.extras import extra

TINY = "tiny"


def served_model(name: str) -> Path:
    """Return a folder of ``name`` that a server can read; a built-in is exported in float32 once. Raises UserError."""
    from ..tinker.server.server import tiny_model_folder

    if name == TINY:
        return tiny_model_folder()
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from ..run.export import ExportArguments, export

    folder = cache_folder() / "tinker" / "models" / name.replace("/", "--")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with extra("filelock", "textpolicy[tinker]").FileLock(folder.with_name(folder.name + ".lock")):
        if not folder.exists():
            export(ExportArguments(to="hf", model=name, dtype="float32", out=folder))
    return folder
