"""``textpolicy campaign plan|run|status|analyze|report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic_settings import CliPositionalArg

from ..analysis.comparison import compare_arms
from ..analysis.permutation import smallest_sign_flip_p
from ..campaign.findings import decided, find, question
from ..campaign.jobs import Attempt, carry_out, read_attempts
from ..campaign.outcomes import read_outcome
from ..campaign.plan import finished, jobs_of, planned, write_manifest, write_plan
from ..campaign.report import write_analysis, write_report
from ..campaign.settings import SUMMARIES, CampaignSettings, Summary, read_campaign
from ..config.settings import Section
from ..errors import UserError, unknown_name


class PlanArguments(Section):
    """Write a campaign's plan into a folder, or run it there."""

    source: CliPositionalArg[Path]
    """A campaign's TOML file, or the folder of one that was planned."""
    output: Path | None = None
    """Folder of the campaign; campaigns/NAME after the file if not given."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Seeds of every arm, in place of the file's: 0,1,2,3,4,5."""
    engine: Literal["mlx", "tinker"] | None = None
    """Where every run trains, in place of the file's."""
    summary: Summary | None = None
    """The one number of a run, in place of the file's."""
    stopping: Literal["fixed", "anytime"] | None = None
    """All seeds, or stop as soon as the evidence is enough; in place of the file's."""

    def settings(self) -> tuple[CampaignSettings, Path]:
        """The campaign and its folder. Raises UserError."""
        changes = {k: v for k in ("seeds", "engine", "summary", "stopping") if (v := getattr(self, k)) is not None}
        if self.source.is_dir():
            if changes or self.output:
                raise UserError(f"{self.source} is planned already; give its TOML file beside --output to change it")
            return planned(self.source), self.source
        return read_campaign(self.source, changes), self.output or Path("campaigns") / self.source.stem


class RunArguments(PlanArguments):
    """Run a campaign, or go on with it: what is finished is not run again."""

    parallel: Annotated[int, Field(ge=1)] = 1
    """Runs at a time."""
    continue_on_error: bool = False
    """Start the runs behind one that failed."""


class FolderArguments(Section):
    """Look at a campaign."""

    folder: CliPositionalArg[Path]
    """Of the campaign."""


def main(arguments: list[str]) -> int:
    """Plan, run and judge arms x seeds: textpolicy campaign plan|run|status|analyze|report."""
    from ..config.flags import parse

    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name not in COMMANDS:
        raise unknown_name("campaign command", name, COMMANDS)
    kind, command = COMMANDS[name]
    return command(parse(kind, arguments[1:], f"campaign {name}"))


def _usage() -> str:
    lines = [f"  {name:<10} {(command.__doc__ or '').splitlines()[0]}" for name, (_, command) in COMMANDS.items()]
    usage = ["usage: textpolicy campaign COMMAND [ARGUMENTS]", "", "Arms x seeds, and what they show.", "", *lines]
    return "\n".join([*usage, "", "'textpolicy campaign COMMAND --help' describes one."])


def plan(asked: PlanArguments) -> int:
    """Check every run's settings and write them down: plan FILE.toml [--output FOLDER]."""
    settings, root = asked.settings()
    write_plan(settings, root)
    print("\n".join(_plan_lines(settings, root)))
    return 0


def _plan_lines(settings: CampaignSettings, root: Path) -> list[str]:
    n = len(settings.seeds)
    words = [
        f"{len(settings.arms)} arms x {n} {'seed' if n == 1 else 'seeds'}, planned in {root}",
        f"decided by {SUMMARIES[settings.summary]}, against {settings.reference}",
    ]
    if settings.stopping == "fixed" and smallest_sign_flip_p(n) > settings.alpha:
        words.append(
            f"note: {n} paired seeds cannot reach p <= {settings.alpha:g}, whatever they show (the least p is "
            f"{smallest_sign_flip_p(n):.3g}); six can at 0.05"
        )
    return [*words, f"run it with: textpolicy campaign run {root}"]


def run(asked: RunArguments) -> int:
    """Run it, or go on where it stopped, and report: run FILE.toml|FOLDER [--parallel N]."""
    settings, root = asked.settings()
    write_plan(settings, root)
    attempts = carry_out(
        jobs_of(settings, root),
        root,
        parallel=asked.parallel,
        continue_on_error=asked.continue_on_error,
        enough=lambda: settings.stopping == "anytime" and enough(settings, root),
    )
    status = _status(settings, root, attempts)
    write_manifest(settings, root, status)
    if status == "completed":
        return report(FolderArguments(folder=root))
    print(f"{status}: the same command goes on with what is not finished")
    return 1


def enough(settings: CampaignSettings, root: Path) -> bool:
    """Whether the pairs that are whole, in the order of the seeds, decide an anytime campaign."""
    values: dict[str, dict[int, float]] = {arm: {} for arm in settings.arms}
    for seed in settings.seeds:
        folders = {arm: root / "runs" / arm / f"seed{seed}" for arm in settings.arms}
        if not all(map(finished, folders.values())):
            break
        for arm, folder in folders.items():
            values[arm][seed] = read_outcome(folder, arm, seed, settings.summary).value
    pairs = len(values[settings.reference])
    return pairs > 0 and decided(compare_arms(values, settings.reference, question(settings)), settings)


def _status(settings: CampaignSettings, root: Path, attempts: list[Attempt]) -> str:
    undone = [j for j in jobs_of(settings, root) if not j.done]
    if not undone or (settings.stopping == "anytime" and enough(settings, root)):
        return "completed"
    return "failed" if any(a.returncode for a in attempts) else "partial"


def status(asked: FolderArguments) -> int:
    """Which runs are finished, failed or to come: status FOLDER."""
    settings = planned(asked.folder)
    last = {(a.arm, a.seed): a for a in read_attempts(asked.folder)}
    for job in jobs_of(settings, asked.folder):
        attempt = last.get((job.arm, job.seed))
        print(f"{job.name:<32} {_state(job.done, job.folder.exists(), attempt)}")
    return 0


def _state(done: bool, begun: bool, attempt: Attempt | None) -> str:
    if done:
        return f"finished in {attempt.seconds:.0f} s" if attempt is not None else "finished"
    if attempt is not None and attempt.returncode:
        return f"failed ({attempt.returncode})"
    return "begun" if begun else "to come"


def analyze(asked: FolderArguments) -> int:
    """Compare the finished runs and print the verdict: analyze FOLDER."""
    settings = planned(asked.folder)
    found = find(settings, asked.folder, jobs_of(settings, asked.folder))
    print(found.verdict)
    print(f"written to {write_analysis(found, asked.folder)}")
    return 0


def report(asked: FolderArguments) -> int:
    """Write the report as Markdown, JSON and HTML: report FOLDER."""
    settings = planned(asked.folder)
    found = find(settings, asked.folder, jobs_of(settings, asked.folder))
    paths = write_report(found, asked.folder)
    print(found.verdict)
    print("written to " + ", ".join(map(str, paths)))
    return 0


COMMANDS: dict[str, tuple[type[Section], Any]] = {
    "plan": (PlanArguments, plan),
    "run": (RunArguments, run),
    "status": (FolderArguments, status),
    "analyze": (FolderArguments, analyze),
    "report": (FolderArguments, report),
}
