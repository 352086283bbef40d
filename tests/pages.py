"""The fenced blocks of README.md and docs/, and what becomes of each: run, shown, or marked as not run."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[1]
FILES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md"))]

# A comment on the line above a block: the page's reader does not see it, and a test does not run the block.
MARK = re.compile(r"^\s*<!-- not run: (?P<why>\S+ \S.*\S) -->\s*$")
FENCE = re.compile(r"^(?P<indent>\s*)(?P<ticks>`{3,}|~{3,})(?P<info>.*)$")
PROGRAMS = ("textpolicy", "python")  # what a shell block may call without a mark

Fate = Literal["run", "shown", "not run"]


@dataclass(frozen=True)
class Block:
    """What stands between two fences."""

    file: str
    line: int  # of the opening fence, from 1
    language: str
    text: str
    why_not: str | None  # the mark's reason
    above: str  # the paragraph above it

    @property
    def saved_as(self) -> str | None:
        """The file that the reader is told to make of it, by a paragraph that ends in "Save this as `NAME`:"."""
        told = re.search(r"\bSave this as `(?P<name>[^`/]+)`:$", self.above)
        return told["name"] if told else None

    @property
    def fate(self) -> Fate:
        """What the tests do with it; a ValueError for a block that is neither run nor marked."""
        if self.why_not is not None:
            return "not run"
        if self.language == "text":
            return "shown"
        if self.language in ("python", "toml"):
            return "run"
        if self.language == "bash" and all(words[0] in PROGRAMS for words in commands(self)):
            return "run"
        raise ValueError(
            f"{self.file}:{self.line}: a block of {self.language or 'no language'} is neither run nor marked; make it "
            f"python, toml, text, or bash that calls {' and '.join(PROGRAMS)} alone, or write the line "
            "<!-- not run: the reason --> above it"
        )


def blocks_of(file: str) -> list[Block]:
    """The blocks of a page of the repository."""
    return blocks_in((ROOT / file).read_text(encoding="utf-8"), file)


def blocks_in(text: str, file: str = "a page") -> list[Block]:
    """The blocks of ``text`` in order; a ValueError for one that does not end."""
    found: list[Block] = []
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        opening = FENCE.match(lines[at])
        if opening:
            end = _end(lines, at, opening["ticks"], file)
            mark = MARK.match(lines[at - 1]) if at else None
            indent = len(opening["indent"])
            body = "\n".join(line[indent:] if not line[:indent].strip() else line for line in lines[at + 1 : end])
            above = "\n".join(lines[: at - 1 if mark else at]).rstrip().rpartition("\n\n")[2]
            found.append(Block(file, at + 1, opening["info"].strip(), body, mark["why"] if mark else None, above))
            at = end
        at += 1
    return found


def _end(lines: list[str], at: int, ticks: str, file: str) -> int:
    for n in range(at + 1, len(lines)):
        if re.fullmatch(rf"\s*{re.escape(ticks[0])}{{{len(ticks)},}}\s*", lines[n]):
            return n
    raise ValueError(f"{file}:{at + 1}: the block that begins here does not end; close it")


def commands(block: Block) -> list[list[str]]:
    """The words of every command of a shell block, comments left out and continued lines joined."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def script(file: str) -> str:
    """The Python that runs on a page, with every other line blank, so that line numbers stay."""
    total = len((ROOT / file).read_text(encoding="utf-8").splitlines())
    lines = [""] * total
    for block in blocks_of(file):
        if block.language == "python" and block.why_not is None:
            body = block.text.splitlines()
            lines[block.line : block.line + len(body)] = body
    return "\n".join(lines)


# Links


LINK = re.compile(r"(?<!\\)\[(?:[^\]\[]|\[[^\]]*\])*\]\(<?(?P<to>[^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")


def without_blocks(text: str) -> str:
    """``text`` without its blocks, which hold neither links nor headings."""
    lines = text.splitlines()
    for block in reversed(blocks_in(text)):
        lines[block.line - 1 : block.line + 1 + len(block.text.splitlines())] = [""]
    return "\n".join(lines)


def links(text: str) -> list[str]:
    """Where the links and pictures of ``text`` lead."""
    return [found["to"] for found in LINK.finditer(re.sub(r"(`+).+?\1", "code", without_blocks(text)))]


def anchors(text: str) -> set[str]:
    """What may stand behind # in a link to a page: its headings, as GitHub names them."""
    found: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", without_blocks(text), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        names.add(name if name not in found else f"{name}-{found[name]}")
        found[name] = found.get(name, 0) + 1
    return names


def broken_links(file: str) -> list[str]:
    """Links of a page that lead to no file, or to no heading of it; addresses of other sites are not asked."""
    text = (ROOT / file).read_text(encoding="utf-8")
    return [to for to in links(text) if not _leads(file, text, to)]


def _leads(file: str, text: str, to: str) -> bool:
    if re.match(r"[a-z]+:", to):
        return to.startswith(("https://", "mailto:"))
    path, _, anchor = to.partition("#")
    target = (ROOT / file).parent / path if path else ROOT / file
    if not target.exists() or not target.resolve().is_relative_to(ROOT.resolve()):
        return False
    if not anchor:
        return True
    return target.suffix == ".md" and anchor in anchors(target.read_text(encoding="utf-8") if path else text)
