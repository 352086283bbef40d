"""The script ``tinker_campaign.py``: grpo against the full recipe on a Tinker server, over the same seeds."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..._system.files import write_whole
from ...analysis.plain import plain
from ...analysis.sepa.significance import build_sepa_significance_markdown, evaluate_sepa_significance
from ...config.settings import NonNegative, Positive, PositiveInt
from ...errors import UserError
from ..figures import figures
from ..findings import find
from ..jobs import Attempt, Job
from ..plan import read_manifest, versions
from ..report import as_json, markdown, page
from ..settings import CampaignSettings, Prices
from .scripts import (
    CampaignArguments,
    MathAlgorithm,
    MathCampaignSettings,
    Seeds,
    math_job,
    new_root,
    run_campaign,
    write_commands,
)

ARMS: dict[str, MathAlgorithm] = {"baseline": "grpo", "candidate": "full"}


class MathCampaignArguments(MathCampaignSettings, CampaignArguments):
    """Compare grpo with the full recipe on a Tinker server; without --execute only the plan is written."""

    seeds: Seeds = (0,)
    """The seeds of both arms; six are the fewest that can reach p < 0.05."""
    max_steps: PositiveInt = 100
    """Training steps of each run."""
    lr: Positive = 4e-5
    """Learning rate of both arms."""
    baseline_lr: Positive | None = None
    """Learning rate of the baseline, instead of lr."""
    candidate_lr: Positive | None = None
    """Learning rate of the candidate, instead of lr."""
    price_sample: NonNegative = 0.0
    """Per million sampled tokens, for the report."""
    price_train: NonNegative = 0.0
    """Per million tokens that are learned from, for the report."""

    @property
    def rates(self) -> dict[str, float]:
        """The learning rate of each arm."""
        return {"baseline": self.baseline_lr or self.lr, "candidate": self.candidate_lr or self.lr}


def run(args: MathCampaignArguments) -> int:
    """Write the plan; with ``execute`` train, compare and report. Return the exit code. Raises UserError."""
    if len(set(args.seeds)) < len(args.seeds) or not args.seeds:
        raise UserError(f"seeds are {list(args.seeds)}; give at least one, and each once")
    settings = CampaignSettings(
        seeds=args.seeds,
        baseline="baseline",
        alpha=args.alpha,
        prices=Prices(sampled_per_million=args.price_sample, trained_per_million=args.price_train),
        arms={arm: {"algorithm": {"name": name}} for arm, name in ARMS.items()},
    )
    root, one = args.campaign_root or new_root("tinker_campaign"), len(args.seeds) == 1
    jobs = []
    for seed in args.seeds:
        for arm, algorithm in ARMS.items():
            folder = root / arm if one else root / arm / f"seed{seed}"
            jobs.append(math_job(args, arm, algorithm, args.rates[arm], seed, args.max_steps, folder))

    def write(status: str, attempts: Sequence[Attempt], analysis: Mapping[str, Any]) -> None:
        write_plan(args, root, jobs, status, {(a.arm, a.seed): a.returncode for a in attempts}, analysis)

    return run_campaign(args, root, jobs, write, lambda: report(args, settings, root, jobs))


def write_plan(
    args: MathCampaignArguments,
    root: Path,
    jobs: Sequence[Job],
    status: str,
    codes: Mapping[tuple[str, int], int],
    analysis: Mapping[str, Any],
) -> None:
    """Write ``manifest.json`` and ``run_commands.sh``. Raises UserError if ``root`` has another plan.

    An arm's ``command`` and ``returncode`` are those of its first seed; ``runs`` has all of them.
    """
    path = root / "manifest.json"
    before = read_manifest(root) if path.exists() else {}
    fixed = args.model_dump(mode="json", exclude={"execute", "continue_on_error", "parallel"})
    planned = before.get("hyperparameters", {})
    if before and (changed := [k for k, v in fixed.items() if not isinstance(planned, dict) or planned.get(k) != v]):
        raise UserError(f"{root} holds a campaign whose {', '.join(changed)} differ; choose another --campaign-root")
    arms = {}
    for arm, algorithm in ARMS.items():
        runs = [
            {
                "seed": job.seed,
                "log_dir": str(job.folder),
                "command": job.command,
                "returncode": codes.get((arm, job.seed), 0 if job.done else None),
            }
            for job in jobs
            if job.arm == arm
        ]
        first = {k: runs[0][k] for k in ("command", "returncode")}
        lr = args.rates[arm]
        arms[arm] = {"algorithm": algorithm, "lr": lr, "log_dir": str(root / arm), **first, "runs": runs}
    manifest = {
        "campaign_root": str(root),
        "created_at": before.get("created_at") or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "execute": args.execute,
        "status": status,
        "model": args.model,
        "max_steps": args.max_steps,
        "batch_size": args.batch_size,
        "group_size": args.group_size,
        "seeds": list(args.seeds),
        "arms": arms,
        "hyperparameters": fixed,
        "versions": versions(),
        **analysis,
    }
    root.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(manifest, indent=2) + "\n")
    write_commands(jobs, root)


def report(args: MathCampaignArguments, settings: CampaignSettings, root: Path, jobs: Sequence[Job]) -> dict[str, Any]:
    """Write ``analysis/`` with comparison.{json,md,html} and significance.{json,md}; return the manifest's summary."""
    found = find(settings, root, jobs)
    folders = [[job.folder for job in jobs if job.arm == arm] for arm in ARMS]
    significance = evaluate_sepa_significance(
        *folders, alpha=args.alpha, num_resamples=args.resamples, paired=len(args.seeds) > 1
    )
    drawn = figures(found)
    pages = {
        **{f"{name}.svg": svg + "\n" for name, svg in drawn.items()},
        "comparison.json": json.dumps(as_json(found), indent=2) + "\n",
        "comparison.md": markdown(found),
        "comparison.html": page(found, drawn),
        "significance.json": json.dumps(significance.to_dict(), indent=2) + "\n",
        "significance.md": build_sepa_significance_markdown(significance),
    }
    (root / "analysis").mkdir(exist_ok=True)
    for name, text in pages.items():
        write_whole(root / "analysis" / name, text)
    print(found.verdict)
    comparison = {"recommendation": found.recommendation, "verdict": found.verdict}
    return {"comparison": comparison, "significance": plain(significance)}
