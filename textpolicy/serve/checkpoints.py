"""The checkpoints by tinker:// names, and the folders that hold them; no name leads out of the server's folder."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from .._system.files import sync_tree, write_whole
from ..errors import UserError

ABOUT = "checkpoint.json"
KINDS = {"weights": "training", "sampler_weights": "sampler"}
_RUN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}:train:\d{1,9}"
_NAME = r"[A-Za-z0-9_][A-Za-z0-9._=+,@-]{0,127}"
_ADDRESS = re.compile(rf"tinker://({_RUN})/({'|'.join(KINDS)})/({_NAME})")


@dataclass(frozen=True, slots=True)
class Name:
    """The name of a checkpoint: tinker://RUN/KIND/NAME."""

    run: str  # the model that wrote it
    kind: str  # a key of ``KINDS``
    name: str

    @classmethod
    def of(cls, address: Any) -> Self:
        """Return the name that ``address`` spells. Raises UserError for another text."""
        found = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
        if found is None:
            raise UserError(
                f"{address!r:.120} is no path of a checkpoint here; give tinker://RUN/weights/NAME or "
                "tinker://RUN/sampler_weights/NAME, with letters, digits and . _ - in the name"
            )
        return cls(*found.groups())

    def __str__(self) -> str:
        return f"tinker://{self.run}/{self.kind}/{self.name}"


@dataclass(frozen=True, slots=True)
class About:
    """The facts of a checkpoint."""

    base: str
    rank: int
    adapter: dict[str, Any]
    created: float  # seconds since the epoch
    job: str  # the request that wrote it
    expires: float | None = None
    user_metadata: dict[str, str] | None = None
    public: bool = False


class Checkpoints:
    """The checkpoints below ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for stale in folder.glob("*/*/.*"):  # of a server that was killed
            shutil.rmtree(stale, ignore_errors=True)

    def path(self, name: Name) -> Path:
        """Return the folder of a checkpoint, there or not."""
        return self.folder / name.run.replace(":", "-") / name.kind / name.name

    def about(self, name: Name) -> About | None:
        """Return what is known of a checkpoint; None if there is none, or no more."""
        try:
            about = About(**json.loads((self.path(name) / ABOUT).read_text("utf-8")))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return None if about.expires is not None and about.expires < time.time() else about

    def found(self, address: Any) -> tuple[Path, About]:
        """Return the folder at ``address`` and what is known of it. Raises UserError if there is none."""
        name = Name.of(address)
        about = self.about(name)
        if about is None:
            raise UserError(f"there is no checkpoint {name} on this server; save it first, or correct its path")
        return self.path(name), about

    def write(self, name: Name, about: About, fill: Callable[[Path], object], *, overwrite: bool) -> None:
        """Let ``fill`` make the checkpoint's folder, which appears whole or not at all.

        One that the same request wrote before is left alone. Raises UserError for a name that is taken, OSError.
        """
        path, before = self.path(name), self.about(name)
        if before is not None and before.job == about.job:
            return
        if before is not None and not overwrite:
            raise UserError(f"there is a checkpoint {name} already; choose another name, or save with overwrite=True")
        path.parent.mkdir(parents=True, exist_ok=True)
        new, old = (path.with_name(f".{path.name}.{what}-{secrets.token_hex(4)}") for what in ("new", "old"))
        try:
            fill(new)
            (new / ABOUT).write_text(json.dumps(asdict(about)), "utf-8")
            sync_tree(new)
            if path.exists():
                path.rename(old)
            new.rename(path)
            sync_tree(path)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)

    def change(self, address: str, **changed: Any) -> None:
        """Change what is known of a checkpoint. Raises UserError if there is none."""
        path, about = self.found(address)
        write_whole(path / ABOUT, json.dumps(asdict(replace(about, **changed))))

    def delete(self, address: str) -> None:
        """Delete a checkpoint. Raises UserError if there is none."""
        path, _ = self.found(address)
        gone = path.with_name(f".{path.name}.old-{secrets.token_hex(4)}")
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def all(self, run: str | None = None) -> Iterator[tuple[Name, About]]:
        """Yield the checkpoints, of one ``run`` or of all, the oldest first."""
        found = []
        for path in self.folder.glob(f"*/*/*/{ABOUT}"):
            kind, name = path.parts[-3], path.parts[-2]
            try:
                about = About(**json.loads(path.read_text("utf-8")))
            except (FileNotFoundError, ValueError, TypeError):  # deleted meanwhile, or not ours
                continue
            owner = about.job.rpartition(":")[0]
            if run in (None, owner) and not name.startswith(".") and kind in KINDS:
                found.append((Name(owner, kind, name), about))
        now = time.time()
        yield from sorted(
            (pair for pair in found if pair[1].expires is None or pair[1].expires > now), key=lambda p: p[1].created
        )

    def expire(self) -> None:
        """Delete the checkpoints whose time has passed."""
        for path in self.folder.glob(f"*/*/[!.]*/{ABOUT}"):
            about = json.loads(path.read_text("utf-8"))
            if about["expires"] is not None and about["expires"] < time.time():
                shutil.rmtree(path.parent, ignore_errors=True)
