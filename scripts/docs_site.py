"""The hooks of mkdocs.yml: the API reference, the command line's tables, and the files that pages link to."""

from __future__ import annotations

import ast
import os
import posixpath
import re
import subprocess
import sys
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package itself, which costs nothing to import

from textpolicy import _HOME  # noqa: E402

LINK = re.compile(r"(?P<before>\]\()(?P<to>[^)#\s]*)(?P<anchor>#[^)\s]*)?(?P<after>\))")
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LANGUAGES = {".py": "python", ".toml": "toml", "": "text", ".jsonl": "json"}
LONGEST = 200_000  # characters of a file that is shown
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/RESULTS.md")  # shown as pages

# The public names by what they are for; each stands once, and a test says that none is missing.
GROUPS: dict[str, list[str]] = {
    "Models and policies": ["mlx.models", "generation.mlx_generation"],
    "Adapters": ["generation.lora", "generation.reload", "config.adapters", "mlx.adapters.merging"],
    "Rewards": ["rewards", "rewards.scoring", "rewards.math", "rewards.sandbox"],
    "Environments": ["environment"],
    "Rollouts": ["rollout", "buffer"],
    "Training": ["training", "loop.train", "config.settings", "run.training_run", "loop.evaluation"],
    "Algorithms": ["algorithms", "algorithms.grpo", "algorithms.gspo", "algorithms.maxrl", "algorithms.hicra",
                   "algorithms.length", "algorithms.sepa", "algorithms.selection", "environment.text.pieces", "losses"],
    "Records and engines": ["types", "engine", "record.sinks", "errors"],
    "After a run": ["analysis", "doctor", "validate"],
}  # fmt: skip


def on_files(files: Any, config: Any) -> Any:
    """Add the reference and the linked files outside docs/."""
    for name, text in reference().items():
        files.append(File.generated(config, f"reference/{name}", content=text))
    for path in outside(files):
        target = ROOT / path
        if path in PAGES:
            text = target.read_text(encoding="utf-8")
        else:
            shown = target.read_text(encoding="utf-8")[:LONGEST] if target.is_file() else listing(target)
            text = f"# {path}\n\n````{LANGUAGES.get(target.suffix, 'text')}\n{shown}\n````\n"
        files.append(File.generated(config, page_of(path), content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill the tables of the command line, and point links that leave docs/ to the pages made of those files."""
    here = page.file.src_uri
    return linked(command_line() if here == "09_cli.md" else markdown, here)


def command_line() -> str:
    """Return docs/09_cli.md with its tables. Raises PluginError.

    The package's dependencies are in .venv, not in the site's environment, so .venv's Python prints the page.
    """
    own = ROOT / ".venv" / "bin" / "python"
    python = own if own.exists() else sys.executable
    done = subprocess.run(
        [str(python), str(ROOT / "scripts" / "cli_page.py")],
        capture_output=True,
        encoding="utf-8",
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    if done.returncode != 0:
        raise PluginError(
            f"scripts/cli_page.py failed with {python}; run 'make docs', which makes .venv:\n{done.stderr}"
        )
    return done.stdout


def linked(markdown: str, here: str) -> str:
    """Return ``markdown`` of the page ``here`` with links to the repository's files pointed to their pages."""
    source = source_of(here)
    parts = FENCED.split(markdown)

    def led(found: re.Match[str]) -> str:
        to = found["to"]
        if not to or ":" in to or here.startswith("reference/"):
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), to))
        target = page_of(path)
        away = os.path.relpath(target, posixpath.dirname(here) or ".")
        return f"{found['before']}{away}{found['anchor'] or ''}{found['after']}"

    return "".join(part if part.startswith("```") else LINK.sub(led, part) for part in parts)


def source_of(page: str) -> str:
    """The repository's file behind a page."""
    if page.startswith("repository/"):
        path = page.removeprefix("repository/")
        return path if path in PAGES else path.removesuffix(".md")
    return f"docs/{page}"


def page_of(path: str) -> str:
    """The page of a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"repository/{path}" if path in PAGES else f"repository/{path}.md"


def outside(files: Any) -> list[str]:
    """The repository's files that pages link to, PAGES first, then the files that those link to."""
    found = [*PAGES]
    texts = {f"docs/{f.src_uri}": Path(f.abs_src_path).read_text(encoding="utf-8") for f in files
             if f.abs_src_path and f.src_uri.endswith(".md")}  # fmt: skip
    texts |= {path: (ROOT / path).read_text(encoding="utf-8") for path in PAGES}
    for source, text in texts.items():
        for link in LINK.finditer(FENCED.sub("", text)):
            to = link["to"]
            path = posixpath.normpath(posixpath.join(posixpath.dirname(source), to)) if to and ":" not in to else ""
            if path and not path.startswith("docs/") and path not in found and (ROOT / path).exists():
                found.append(path)
    return found


def listing(folder: Path) -> str:
    return "\n".join(sorted(p.name for p in folder.iterdir() if not p.name.startswith((".", "__"))))


def reference() -> dict[str, str]:
    """The pages of the API reference."""
    pages = {}
    lines = ["# Reference", "", "Made from the docstrings. `import textpolicy as tp` has:", ""]
    for group, modules in GROUPS.items():
        name = group.lower().replace(" ", "_") + ".md"
        names = [public for public, home in _HOME.items() if home in modules]
        lines.append(f"- [{group}]({name}): " + (", ".join(f"`{n}`" for n in names) or "not at the top level"))
        body = [f"# {group}", ""]
        for module in modules:
            body += [f"## textpolicy.{module}", ""]
            for path, members in {module: [], **reexported(module)}.items():
                body += [f"::: textpolicy.{path}", "    options:", *options(members), ""]
        pages[name] = "\n".join(body)
    return {"index.md": "\n".join([*lines, ""]), **pages}


def reexported(module: str) -> dict[str, list[str]]:
    """The public names that a package without a literal ``__all__`` imports, by the module that defines them.

    mkdocstrings finds neither lazy names nor those that a package imports ``as`` themselves.
    """
    path = ROOT / "textpolicy" / module.replace(".", "/") / "__init__.py"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if '__all__ = ["' in text or "__all__ = [\n" in text:
        return {}
    found: dict[str, list[str]] = {}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [alias.name for alias in node.names if alias.asname == alias.name]
            home = resolve_name("." * node.level + (node.module or ""), f"textpolicy.{module}")
            if names:
                found.setdefault(home.removeprefix("textpolicy."), []).extend(names)
    return found


def options(members: list[str]) -> list[str]:
    """The options of mkdocstrings for a module: no heading of its own, and only ``members`` if there are any."""
    shown = ("show_root_heading: false", "show_root_toc_entry: false", "heading_level: 3")
    return [f"      {line}" for line in (*shown, *([f"members: {members}"] if members else []))]
