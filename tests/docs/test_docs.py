"""Every block of README.md and docs/ is run as written or says why not; links lead somewhere; words are spelled."""

import glob
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from pages import FILES, MARK, ROOT, Block, blocks_in, blocks_of, broken_links, commands, script
from pydantic import BaseModel
from tiny_folder import write_tiny_model

from textpolicy.campaign.settings import CampaignSettings
from textpolicy.cli.campaign import COMMANDS as CAMPAIGN
from textpolicy.cli.main import COMMANDS, AlgorithmsArguments, DoctorArguments, TasksArguments, main
from textpolicy.config.flags import parse
from textpolicy.config.recipe import configure
from textpolicy.config.settings import Config, check_config
from textpolicy.config.settings import settings_of as leaves
from textpolicy.report.page import ReportArguments
from textpolicy.report.view.server import ViewArguments
from textpolicy.run.export import ExportArguments
from textpolicy.run.inference import EvalArguments, GenerateArguments
from textpolicy.run.resume import TrainArguments
from textpolicy.serve.command import ServeArguments, TinkerServerArguments

SHOWN_WHOLE = {"docs/02_rewards.md"}  # whose output is the same on every machine, and is on the page
ARGUMENTS = {
    "train": TrainArguments,
    "generate": GenerateArguments,
    "eval": EvalArguments,
    "view": ViewArguments,
    "report": ReportArguments,
    "export": ExportArguments,
    "doctor": DoctorArguments,
    "algorithms": AlgorithmsArguments,
    "tasks": TasksArguments,
    "serve": ServeArguments,
    "tinker-server": TinkerServerArguments,
}
WITH_THE_REAL_MODEL = {"README.md": {"range(12)": "range(2)"}}  # which it trains for a minute or two
OF_CAMPAIGNS = {"docs/13_tinker_campaigns.md"}  # tests/campaign runs their commands


def pages_with(language: str, *, marked: bool = False, apart: set[str] = frozenset()) -> list[str]:
    """The pages that have such blocks."""
    return [file for file in FILES if file not in apart and blocks(file, language, marked=marked)]


def blocks(file: str, language: str, *, marked: bool = False) -> list[Block]:
    """Those of a page that are run, or those that are marked."""
    return [b for b in blocks_of(file) if b.language == language and (b.why_not is not None) == marked]


# what becomes of a block


def test_every_block_of_every_page_is_run_or_shown_or_states_why_not():
    for file in FILES:
        assert {block.fate for block in blocks_of(file)} <= {"run", "shown", "not run"}, file


@pytest.mark.parametrize(
    "planted",
    [
        "```\ntextpolicy validate\n```",
        "```sh\ntextpolicy validate\n```",
        "~~~rust\nfn main() {}\n~~~",
        "- a list\n\n  ```console\n  $ textpolicy\n  ```",
        "```bash\ntextpolicy validate\ncurl example.org\n```",
        "```python {.numbered}\nprint(1)\n```",
        "<!-- not run: -->\n```bash\ncurl example.org\n```",
        "<!-- not run -->\n```bash\ncurl example.org\n```",
        "<!-- not run: it takes minutes -->\n\n```bash\ncurl example.org\n```",
    ],
)
def test_a_planted_block_that_is_neither_run_nor_marked_is_found(planted):
    [block] = blocks_in(f"# A page\n\n{planted}\n", "planted.md")
    with pytest.raises(ValueError, match=r"planted\.md:\d+: a block of .* is neither run nor marked"):
        _ = block.fate


def test_a_block_that_does_not_end_is_found():
    with pytest.raises(ValueError, match=r"planted\.md:3: the block that begins here does not end"):
        blocks_in("# A page\n\n```python\nprint(1)\n", "planted.md")


def test_every_mark_stands_above_a_block():
    for file in FILES:
        marked = [block for block in blocks_of(file) if block.why_not]
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        assert sum("<!-- not run" in line for line in lines) == len(marked), file
        assert sum(bool(MARK.match(line)) for line in lines) == len(marked), file


# Python


@pytest.mark.slow
@pytest.mark.parametrize("file", pages_with("python"))
def test_the_python_blocks_of_a_page_run_top_to_bottom(file, tmp_path, request):
    path, text = tmp_path / f"{Path(file).stem}.py", script(file)
    if file not in WITH_THE_REAL_MODEL:
        request.getfixturevalue("small_built_in")
    for many, few in WITH_THE_REAL_MODEL.get(file, {}).items():
        assert text.count(many) == 1
        text = text.replace(many, few)
    path.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", path.name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, f"{file}, line numbers as in the file:\n{done.stderr}"
    if file in SHOWN_WHOLE:
        assert done.stdout.splitlines() == [line for b in blocks(file, "text") for line in b.text.splitlines()]


def environment():
    """As a reader has it who installed this checkout, and is offline."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths}


# settings


@pytest.mark.parametrize("file", pages_with("toml"))
def test_the_settings_of_a_page_make_a_run_or_a_campaign(file):
    for block in blocks(file, "toml"):
        values = tomllib.loads(block.text)
        assert values
        if "arms" in values:
            CampaignSettings.model_validate(values)
        else:
            configure(check_config(values, file))


# the shell: as written, but for a tiny random model in place of every other and few steps in place of many

FEW = {
    "train": [
        "--steps=2",
        "--optimizer.warmup-steps=1",
        "--rollout.prompts-per-step=4",
        "--rollout.group-size=2",
        "--rollout.max-tokens=4",
        "--evaluation.problems=2",
        "--quiet",
    ],
    "eval": ["--problems=2"],
}


class Shell:
    """Runs commands in the folder of a reader who has the repository at hand and two runs behind them."""

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path, model: Path) -> None:
        self.patch, self.folder, self.model = patch, folder, model
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("textpolicy.mlx.models.find_model", self.find)
        patch.setattr("textpolicy.mlx.memory.preflight", as_asked)
        for name in ("examples", "scripts"):
            (folder / name).symlink_to(ROOT / name)
        shutil.copy(ROOT / "examples" / "train.toml", "run.toml")

    def find(self, name: str | Path) -> Path:
        """The folder of a model on disk, and the tiny one for every other name."""
        return Path(name) if (Path(name) / "config.json").exists() else self.model

    def __call__(self, words: list[str]) -> None:
        """Run one command; the process ends well, or a doctor found something."""
        words = [found for word in words for found in (sorted(glob.glob(word)) or [word])]
        if words[0] == "python":
            done = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True, env=environment())
            assert done.returncode == 0, done.stderr
            return
        name, arguments = words[1], words[2:]
        if "--help" in arguments or name.startswith("-"):
            with pytest.raises(SystemExit, match="0") if name in ARGUMENTS else nothing():
                main(words[1:])
            return
        if "--resume" in arguments:
            self.cut_short(Path(arguments[arguments.index("--resume") + 1]))
        elif "--output" in arguments and Path(arguments[arguments.index("--output") + 1]).exists():
            self.cut_short(Path(arguments[arguments.index("--output") + 1]))
        if name in FEW and "--resume" not in arguments:
            first = [arguments.pop(0)] if arguments and not arguments[0].startswith("-") else []
            arguments = [*first, *FEW[name], *arguments]
        codes = (0, 1) if name == "doctor" else (0,)
        assert main([name, *arguments]) in codes, words

    def train(self, *flags: str) -> None:
        assert main(["train", *FEW["train"], *flags]) == 0

    def cut_short(self, folder: Path) -> None:
        """Make the run in ``folder`` one that ended in its second step."""
        from textpolicy.mlx.engine import MLXEngine

        true, calls = MLXEngine.update, []

        def update(*arguments):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return true(*arguments)

        shutil.rmtree(folder, ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MLXEngine, "update", update)
            assert main(["train", *FEW["train"], f"--output={folder}"]) == 130


def as_asked(engine, *arguments, **keywords):
    """In place of measuring what a run needs."""
    from textpolicy.mlx.memory import Plan

    return Plan(engine.micro_batch_tokens, engine.decode_rows, 0.0, 0.0, 1.0, ())


def nothing():
    from contextlib import nullcontext

    return nullcontext()


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_tiny_model(folder, mkdir=True)
    return folder


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory, tiny_model):
    """``runs/`` with the two that pages speak of."""
    folder = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        shell = Shell(patch, folder, tiny_model)
        for seed in (0, 1):
            shell.train(f"--seed={seed}", f"--output=runs/largest-grpo-seed{seed}")
    return folder / "runs"


@pytest.fixture
def shell(monkeypatch, tmp_path, tiny_model, two_runs) -> Callable[[list[str]], None]:
    import uvicorn

    monkeypatch.setattr(uvicorn.Server, "run", lambda *arguments, **keywords: None)  # it serves until Ctrl-C
    shutil.copytree(two_runs, tmp_path / "runs")
    return Shell(monkeypatch, tmp_path, tiny_model)


@pytest.mark.parametrize("file", pages_with("bash", apart=OF_CAMPAIGNS))
def test_the_commands_of_a_page_run_as_written(file, shell):
    for block in blocks_of(file):
        if block.saved_as:
            Path(block.saved_as).write_text(block.text, encoding="utf-8")
        elif block.language == "bash" and block.why_not is None:
            for words in commands(block):
                shell(words)


@pytest.mark.parametrize("file", pages_with("bash"))
def test_a_command_that_needs_a_checkout_says_so(file):
    """The package has neither examples/ nor scripts/, so the paragraph above such a block speaks of a checkout."""
    for block in blocks(file, "bash"):
        if any(word.startswith(("examples/", "scripts/")) for words in commands(block) for word in words):
            assert "checkout" in block.above, f"{file}:{block.line}"


def test_the_commands_on_campaigns_are_run_by_the_tests_of_campaigns():
    from campaign.test_campaign_pages import PAGES

    assert {*PAGES} == OF_CAMPAIGNS


def test_commands_that_are_not_run_still_parse():
    """Their flags are parsed; the targets of make and the scripts of Python exist."""
    makefile, files = (ROOT / "Makefile").read_text(), pages_with("bash", marked=True)
    assert files
    for words in (words for file in files for block in blocks(file, "bash", marked=True) for words in commands(block)):
        match words:
            case ["textpolicy", name, *arguments]:
                understand(name, arguments)
            case ["make", *targets]:
                assert all(re.search(rf"^{t}:", makefile, re.MULTILINE) for t in targets if "=" not in t), targets
            case ["python", path, *_] if path.endswith(".py"):
                assert (ROOT / path).exists(), path


def understand(name: str, arguments: list[str]) -> None:
    assert name in COMMANDS
    if name == "campaign":
        kind, *_ = CAMPAIGN[arguments[0]]
        parse(kind, arguments[1:], "campaign")
    elif name == "validate":
        assert {*arguments} <= {"--json", "--train"}
    else:
        parse(ARGUMENTS[name], arguments, name)


def test_every_command_is_one_whose_flags_the_tests_can_read():
    assert {*ARGUMENTS, "campaign", "validate"} == {*COMMANDS}


# links and words

LINKED = [*FILES, "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/RESULTS.md"]


def test_every_link_leads_to_a_file_and_a_heading():
    assert {file: broken for file in LINKED if (broken := broken_links(file))} == {}


def test_every_page_can_be_reached_from_the_readme():
    reached, ahead = set(), ["README.md"]
    while ahead:
        page = ahead.pop()
        reached.add(page)
        ahead += [to for to in linked_pages(page) if to not in reached]
    assert {*FILES} <= reached


def linked_pages(file: str) -> list[str]:
    from pages import links

    found = [to.partition("#")[0] for to in links((ROOT / file).read_text(encoding="utf-8"))]
    paths = [((ROOT / file).parent / to).resolve() for to in found if to.endswith(".md") and ":" not in to]
    return [str(path.relative_to(ROOT)) for path in paths]


SPELLED = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs", "examples", "textpolicy", "benchmarks/RESULTS.md"]


def test_words_are_spelled_as_codespell_knows_them():
    pytest.importorskip("codespell_lib", reason="codespell is not installed; it comes with the extra dev")
    done = subprocess.run(
        [sys.executable, "-m", "codespell_lib", *SPELLED],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == ""
    assert done.returncode == 0, done.stderr


def test_the_page_of_the_command_line_has_its_tables_only_when_it_is_built():
    sys.path.insert(0, str(ROOT / "scripts"))
    from cli_page import ARGUMENTS, MARK, PAGE, filled

    page = PAGE.read_text(encoding="utf-8")
    for name in ("commands", "arguments", "settings"):
        between = page.partition(MARK.format(name))[2].partition(MARK.format("end of " + name))[0]
        assert "--help` prints the same" in between
        assert len(between.strip().splitlines()) == 1
    text = filled(page)
    assert all(f"| `{name}` |" in text for name in COMMANDS)
    sections = [*ARGUMENTS, "train", *(f"campaign {name}" for name in CAMPAIGN)]
    assert all(f"### textpolicy {name}\n" in text for name in sections)
    for name, kind in ARGUMENTS.items():
        section = text.partition(f"### textpolicy {name}\n")[2].partition("\n### ")[0]
        assert all(field.description in section for _, field in leaves(kind))
    assert {f"| `{name}` |" for name in settings_of(Config)} <= set(re.findall(r"\| `\w+` \|", text))


def settings_of(kind: type[BaseModel]) -> set[str]:
    """The names of the settings of a section and of those below it."""
    inner = [type(field.default) for field in kind.model_fields.values() if isinstance(field.default, BaseModel)]
    own = {name for name, field in kind.model_fields.items() if not isinstance(field.default, BaseModel)}
    return own.union(*map(settings_of, inner))
