"""The commands ``textpolicy campaign plan|run|status|analyze|report``."""

from __future__ import annotations

import shlex
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from .._system.terminal import say
from ..analysis._inputs import statsmodels
from ..analysis.comparison import compare_arms
from ..analysis.permutation import smallest_sign_flip_p
from ..analysis.sequential import smallest_anytime_p
from ..campaign.findings import decided, find, question
from ..campaign.jobs import carry_out, read_attempts
from ..campaign.outcomes import read_outcome
from ..campaign.plan import in_words, jobs_of, planned, write_manifest, write_plan
from ..campaign.report import write_analysis, write_report
from ..campaign.settings import SUMMARIES, CampaignSettings, Summary, read_campaign
from ..config.settings import LocalPath, Positional, Section
from ..errors import UserError, unknown_name
from ..record.reader import ended
from ..report.words import duration


class PlanArguments(Section):
    """Write a campaign's plan into a folder, or run it there."""

    source: Annotated[LocalPath, Positional]
    """A campaign's TOML file, or the folder of one that was planned."""
    output: LocalPath | None = None
    """Folder of the campaign; campaigns/NAME after the file if not given."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Seeds of every arm, instead of the file's: 0,1,2,3,4,5."""
    engine: Literal["mlx", "tinker"] | None = None
    """Where every run trains, instead of the file's."""
    summary: Summary | None = None
    """The one number of a run, instead of the file's."""
    stopping: Literal["fixed", "anytime"] | None = None
    """All seeds, or stop as soon as the evidence is enough; instead of the file's."""

    def settings(self) -> tuple[CampaignSettings, Path]:
        """Return the campaign and its folder. Raises UserError."""
        changes = {k: v for k in ("seeds", "engine", "summary", "stopping") if (v := getattr(self, k)) is not None}
        if self.source.is_dir():
            if changes or self.output:
                raise UserError(f"{self.source} is planned already; give its TOML file beside --output to change it")
            return planned(self.source), self.source
        return read_campaign(self.source, changes), self.output or Path("campaigns") / self.source.stem


class RunArguments(PlanArguments):
    """Run a campaign, or resume it: finished runs are not repeated."""

    parallel: Annotated[int, Field(ge=1)] = 1
    """Runs at a time."""
    continue_on_error: bool = False
    """Start the remaining runs after one that failed."""


class FolderArguments(Section):
    """The folder of a campaign."""

    folder: Annotated[LocalPath, Positional]
    """Folder of the campaign."""


class StatusArguments(FolderArguments):
    """Print which runs of a campaign are finished, failed or to come."""


class AnalyzeArguments(FolderArguments):
    """Compare the finished runs of a campaign, write analysis.json and print the verdict."""


class ReportArguments(FolderArguments):
    """Write a campaign's report as Markdown, JSON and HTML."""


def main(arguments: list[str]) -> int:
    """Plan, run and evaluate arms x seeds: textpolicy campaign plan|run|status|analyze|report."""
    from ..config.flags import parse

    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print("usage: textpolicy campaign COMMAND [ARGUMENTS]\n\nArms x seeds, and what they show.\n")
        for command, (_, _, meaning) in COMMANDS.items():
            say(f"  {command:<10} {meaning}", 13)
        print("\n'textpolicy campaign COMMAND --help' describes one.")
        return 0
    if name not in COMMANDS:
        raise unknown_name("campaign command", name, COMMANDS)
    kind, command, _ = COMMANDS[name]
    with in_words():
        return int(command(parse(kind, arguments[1:], f"campaign {name}")))


def plan(args: PlanArguments) -> int:
    """Check every run's settings and write them down."""
    settings, root = args.settings()
    write_plan(settings, root)
    n = len(settings.seeds)
    print(f"{len(settings.arms)} arms x {n} {'seed' if n == 1 else 'seeds'}, planned in {root}")
    print(f"decided by {SUMMARIES[settings.summary]}, against {settings.reference}")
    family = len(settings.arms) - 1
    least = smallest_sign_flip_p if settings.stopping == "fixed" else smallest_anytime_p
    if family * least(n) > settings.alpha:
        adjusted = f", {min(1.0, family * least(n)):.3g} adjusted for {family + 1} arms" if family > 1 else ""
        wanted = next(pairs for pairs in count(n) if family * least(pairs) <= settings.alpha)
        print(
            f"note: {n} paired {'seed' if n == 1 else 'seeds'} cannot reach p <= {settings.alpha:g}, whatever they "
            f"show (the least p is {min(1.0, least(n)):.3g}{adjusted}); {wanted} can"
        )
    print(f"run it with: {shlex.join(['textpolicy', 'campaign', 'run', str(root)])}")
    return 0


def run(args: RunArguments) -> int:
    """Run the campaign, or resume it, and report."""
    statsmodels("multitest")  # the report needs it: said before the first run, not after the last
    settings, root = args.settings()
    write_plan(settings, root)
    jobs = jobs_of(settings, root)

    def stop() -> bool:
        return settings.stopping == "anytime" and enough(settings, root)

    attempts = carry_out(jobs, root, parallel=args.parallel, continue_on_error=args.continue_on_error, enough=stop)
    status = "failed" if any(a.returncode for a in attempts) else "partial"
    if all(job.done for job in jobs) or stop():
        status = "completed"
    write_manifest(settings, root, status)
    if status == "completed":
        return report(FolderArguments(folder=root))
    print(f"{status}: the same command resumes with the unfinished runs")
    return 1


def enough(settings: CampaignSettings, root: Path) -> bool:
    """Return whether the complete pairs, in the order of the seeds, decide an anytime campaign."""
    values: dict[str, dict[int, float]] = {arm: {} for arm in settings.arms}
    for seed in settings.seeds:
        folders = {arm: root / "runs" / arm / f"seed{seed}" for arm in settings.arms}
        if not all(map(ended, folders.values())):
            break
        for arm, folder in folders.items():
            values[arm][seed] = read_outcome(folder, arm, seed, settings.summary).value
    pairs = len(values[settings.reference])
    return pairs > 0 and decided(compare_arms(values, settings.reference, question(settings)), settings)


def status(args: FolderArguments) -> int:
    """Print which runs are finished, failed or to come."""
    last = {(a.arm, a.seed): a for a in read_attempts(args.folder)}
    for job in jobs_of(planned(args.folder), args.folder):
        attempt = last.get((job.arm, job.seed))
        state = "begun" if job.folder.exists() else "to come"
        if job.done:
            state = "finished" if attempt is None else f"finished in {duration(attempt.seconds)}"
        elif attempt is not None and attempt.returncode:
            state = f"failed ({attempt.returncode})"
        print(f"{job.name:<32} {state}")
    return 0


def analyze(args: FolderArguments) -> int:
    """Compare the finished runs and print the verdict."""
    settings = planned(args.folder)
    found = find(settings, args.folder, jobs_of(settings, args.folder))
    say(found.verdict)
    print(f"written to {write_analysis(found, args.folder)}")
    return 0


def report(args: FolderArguments) -> int:
    """Write the report as Markdown, JSON and HTML."""
    settings = planned(args.folder)
    found = find(settings, args.folder, jobs_of(settings, args.folder))
    paths = write_report(found, args.folder)
    say(found.verdict)
    print("written to " + ", ".join(map(str, paths)))
    return 0


COMMANDS: dict[str, tuple[type[Section], Any, str]] = {
    "plan": (PlanArguments, plan, "Check every run's settings and write them down: plan FILE.toml [--output FOLDER]."),
    "run": (RunArguments, run, "Run the campaign, or resume it, and report: run FILE.toml|FOLDER [--parallel N]."),
    "status": (StatusArguments, status, "Print which runs are finished, failed or to come: status FOLDER."),
    "analyze": (AnalyzeArguments, analyze, "Compare the finished runs and print the verdict: analyze FOLDER."),
    "report": (ReportArguments, report, "Write the report as Markdown, JSON and HTML: report FOLDER."),
}
