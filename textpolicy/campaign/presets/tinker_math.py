"""``scripts/tinker_campaign.py``: grpo against the full recipe on a Tinker server, over the same seeds."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ...analysis.plain import plain
from ...analysis.sepa.significance import (
    SEPASignificanceReport,
    build_sepa_significance_markdown,
    evaluate_sepa_significance,
)
from ...config.settings import NonNegative, Positive, PositiveInt
from ...errors import UserError
from ..figures import figures
from ..findings import Findings, find
from ..jobs import Attempt, Job, carry_out, write_whole
from ..plan import versions
from ..report import as_json, markdown, page
from ..settings import CampaignSettings, Prices, Share
from .math_jobs import MathAlgorithm, MathSettings, math_job

ARMS: dict[str, MathAlgorithm] = {"baseline": "grpo", "candidate": "full"}


class MathCampaignArguments(MathSettings):
    """Compare grpo with the full recipe on a Tinker server; without --execute only the plan is written."""

    campaign_root: Path | None = None
    """Folder of the campaign; a new one under results/ if not given."""
    execute: bool = False
    """Train; this costs money on the hosted service."""
    continue_on_error: bool = False
    """Start the runs behind one that failed."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    """The same for both arms; six are the fewest that can reach p < 0.05."""
    parallel: PositiveInt = 1
    """Runs at a time."""
    max_steps: PositiveInt = 100
    """Training steps of each run."""
    lr: Positive = 4e-5
    """Learning rate of both arms."""
    baseline_lr: Positive | None = None
    """Of the baseline, in place of lr."""
    candidate_lr: Positive | None = None
    """Of the candidate, in place of lr."""
    alpha: Share = 0.05
    """Level of the tests."""
    resamples: Annotated[int, Field(ge=100)] = 20_000
    """Arrangements drawn where there are too many to go through."""
    price_sample: NonNegative = 0.0
    """Per million sampled tokens, for the report."""
    price_train: NonNegative = 0.0
    """Per million tokens that are learned from, for the report."""

    @property
    def rates(self) -> dict[str, float]:
        """The learning rate of each arm."""
        return {"baseline": self.baseline_lr or self.lr, "candidate": self.candidate_lr or self.lr}

    @property
    def campaign(self) -> CampaignSettings:
        """The same as a campaign, for its analysis. Raises UserError for a seed given twice."""
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise UserError(f"seeds are {list(self.seeds)}; give at least one, and each once")
        prices = Prices(sampled_per_million=self.price_sample, trained_per_million=self.price_train)
        arms: dict[str, Any] = {arm: {"algorithm": {"name": name}} for arm, name in ARMS.items()}
        return CampaignSettings(seeds=self.seeds, baseline="baseline", alpha=self.alpha, prices=prices, arms=arms)


def run(asked: MathCampaignArguments) -> int:
    """Write the plan; with ``execute`` train, compare and report. Returns the exit code."""
    root = asked.campaign_root or Path(f"results/tinker_campaign_{time.strftime('%Y%m%d_%H%M%S')}")
    settings, jobs = asked.campaign, math_jobs(asked, root)
    write_math_plan(asked, root, jobs)
    if not asked.execute:
        print(f"{len(ARMS)} arms x {len(asked.seeds)} seeds, planned in {root}; nothing was run")
        print(f"train with: sh {root / 'run_commands.sh'}, or with --execute, which resumes and reports")
        return 0
    attempts = carry_out(jobs, root, parallel=asked.parallel, continue_on_error=asked.continue_on_error)
    status = status_of(jobs, attempts)
    analysis = compared(asked, settings, root, jobs) if status == "completed" else {}
    write_math_plan(asked, root, jobs, status=status, attempts=attempts, analysis=analysis)
    print(f"{status}: {root}")
    return 0 if status == "completed" else 1


def math_jobs(asked: MathCampaignArguments, root: Path) -> list[Job]:
    """Both arms of a seed, then the next seed; a single seed's runs are in ``root/ARM`` itself."""
    one = len(asked.seeds) == 1
    return [
        math_job(
            asked, arm, algorithm, asked.rates[arm], seed, asked.max_steps,
            root / arm if one else root / arm / f"seed{seed}",
        )
        for seed in asked.seeds
        for arm, algorithm in ARMS.items()
    ]  # fmt: skip


def write_math_plan(
    asked: MathCampaignArguments,
    root: Path,
    jobs: Sequence[Job],
    *,
    status: str = "planned",
    attempts: Sequence[Attempt] = (),
    analysis: dict[str, Any] | None = None,
) -> None:
    """``manifest.json`` and ``run_commands.sh``. Raises UserError where ``root`` holds another plan."""
    path, hyperparameters = root / "manifest.json", asked.model_dump(mode="json")
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    fixed = {k: v for k, v in hyperparameters.items() if k not in ("execute", "continue_on_error", "parallel")}
    if before and (changed := [k for k, v in fixed.items() if before["hyperparameters"].get(k) != v]):
        raise UserError(f"{root} holds a campaign whose {', '.join(changed)} differ; choose another --campaign-root")
    codes = {(a.arm, a.seed): a.returncode for a in attempts}
    manifest = {
        "campaign_root": str(root),
        "created_at": before.get("created_at") or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "execute": asked.execute,
        "status": status,
        "model": asked.model,
        "max_steps": asked.max_steps,
        "batch_size": asked.batch_size,
        "group_size": asked.group_size,
        "seeds": list(asked.seeds),
        "arms": {arm: _arm_row(arm, asked, root, jobs, codes) for arm in ARMS},
        "hyperparameters": fixed,
        "versions": versions(),
        **(analysis or {}),
    }
    write_whole(path, json.dumps(manifest, indent=2) + "\n")
    lines = ["#!/bin/sh", "set -e", *(shlex.join(job.command) for job in jobs)]
    write_whole(root / "run_commands.sh", "\n".join(lines) + "\n")
    (root / "run_commands.sh").chmod(0o755)


def _arm_row(
    arm: str, asked: MathCampaignArguments, root: Path, jobs: Sequence[Job], codes: dict[tuple[str, int], int]
) -> dict[str, Any]:
    """``command`` and ``returncode`` are those of the first seed; ``runs`` has all of them."""
    mine = [job for job in jobs if job.arm == arm]
    runs = [
        {
            "seed": job.seed,
            "log_dir": str(job.folder),
            "command": job.command,
            "returncode": codes.get((arm, job.seed), 0 if job.done else None),
        }
        for job in mine
    ]
    first = {k: runs[0][k] for k in ("command", "returncode")}
    return {"algorithm": ARMS[arm], "lr": asked.rates[arm], "log_dir": str(root / arm), **first, "runs": runs}


def status_of(jobs: Sequence[Job], attempts: Sequence[Attempt]) -> str:
    """completed, failed (no arm came to its end) or partial."""
    if all(job.done for job in jobs):
        return "completed"
    return "partial" if any(job.done for job in jobs) or not attempts else "failed"


def compared(
    asked: MathCampaignArguments, settings: CampaignSettings, root: Path, jobs: Sequence[Job]
) -> dict[str, Any]:
    """Write ``analysis/`` and return what the manifest says of it."""
    found = find(settings, root, jobs)
    folders = [[job.folder for job in jobs if job.arm == arm] for arm in ARMS]
    significance = evaluate_sepa_significance(
        *folders, alpha=asked.alpha, num_resamples=asked.resamples, paired=len(asked.seeds) > 1
    )
    write_pages(found, significance, root / "analysis")
    print(found.verdict)
    comparison = {"recommendation": found.recommendation, "verdict": found.verdict}
    return {"comparison": comparison, "significance": plain(significance)}


def write_pages(found: Findings, significance: SEPASignificanceReport, folder: Path) -> None:
    """comparison.{json,md,html} and significance.{json,md}."""
    drawn = figures(found)
    pages = {
        **{f"{name}.svg": svg + "\n" for name, svg in drawn.items()},
        "comparison.json": json.dumps(as_json(found), indent=2) + "\n",
        "comparison.md": markdown(found),
        "comparison.html": page(found, drawn),
        "significance.json": json.dumps(significance.to_dict(), indent=2) + "\n",
        "significance.md": build_sepa_significance_markdown(significance),
    }
    for name, text in pages.items():
        write_whole(folder / name, text)
