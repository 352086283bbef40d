"""``scripts/sepa_campaign.py``: SEPA against HICRA on countdown, over the same seeds, on this machine."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ...analysis.sepa.litmus import (
    SEPALitmusProfile,
    build_litmus_markdown,
    evaluate_sepa_litmus,
    get_sepa_litmus_profile,
)
from ...analysis.sepa.significance import build_sepa_significance_markdown, evaluate_sepa_significance
from ...config.settings import NonNegative, Positive, PositiveInt, Section
from ...errors import UserError
from ..findings import Findings, curve_of, find
from ..jobs import Job, carry_out, write_whole
from ..plan import jobs_of, write_manifest, write_plan
from ..report import write_report
from ..settings import CampaignSettings, Share, check_campaign


class SEPACampaignArguments(Section):
    """Compare SEPA with HICRA on countdown, seed by seed; without --execute only the plan is written."""

    seeds: tuple[Annotated[int, Field(ge=0)], ...] = tuple(range(101, 109))
    """The same for both arms."""
    model: str = "smollm2-135m"
    """Built-in name, folder or hub id."""
    steps: PositiveInt = 12
    """Training steps of each run."""
    num_problems: PositiveInt = 16
    """Held-out problems that every run is judged on."""
    episodes_per_step: PositiveInt = 8
    """Completions in each step."""
    group_size: Annotated[int, Field(ge=2)] = 4
    """Completions of each problem."""
    batch_size: PositiveInt = 8
    """Completions in each update."""
    max_tokens: PositiveInt = 128
    """Longest completion, in tokens."""
    temperature: Positive = 0.4
    """Of sampling."""
    lr: Positive = 5e-6
    """Learning rate of both arms."""
    advantage_mode: Literal["grpo", "maxrl"] = "grpo"
    """grpo compares the recipes hicra and sepa, maxrl the recipes maxrl and full."""
    baseline_hicra_gamma: NonNegative = 0.3
    """HICRA's strength, of the baseline; with maxrl of the candidate, as the baseline has none."""
    candidate_sepa_steps: Annotated[int, Field(ge=0)] = 8
    """SEPA: steps of the ramp."""
    candidate_sepa_schedule: Literal["linear", "auto"] = "linear"
    """SEPA: linear, or as the variance of execution tokens falls."""
    candidate_sepa_delay_steps: Annotated[int, Field(ge=0)] = 0
    """SEPA: steps before the ramp."""
    candidate_sepa_correct_rate_gate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """SEPA: nothing is pooled before a step has had this share of correct completions."""
    litmus_profile: str = "official_v1"
    """Thresholds of the litmus."""
    litmus_min_run_pairs: Annotated[int, Field(ge=0)] = 0
    """Pairs of runs that the litmus asks for; the profile's if 0."""
    resamples: Annotated[int, Field(ge=100)] = 20_000
    """Arrangements drawn where there are too many to go through."""
    alpha: Share = 0.05
    """Level of the tests."""
    execute: bool = False
    """Train."""
    continue_on_error: bool = False
    """Start the runs behind one that failed."""
    parallel: PositiveInt = 1
    """Runs at a time."""
    campaign_root: Path | None = None
    """Folder of the campaign; a new one under results/ if not given."""

    def settings(self) -> CampaignSettings:
        """As a campaign. Raises UserError, also for seeds given twice and sizes that do not divide."""
        for whole, part in (("episodes_per_step", "group_size"), ("episodes_per_step", "batch_size")):
            if getattr(self, whole) % getattr(self, part):
                raise UserError(
                    f"{whole} is {getattr(self, whole)} and {part} {getattr(self, part)}; set it to a multiple"
                )
        base = {
            "model": self.model,
            "task": "countdown",
            "steps": self.steps,
            "rollout": {
                "prompts_per_step": self.episodes_per_step // self.group_size,
                "group_size": self.group_size,
                "max_tokens": self.max_tokens,
                "temperature": self.temperature,
            },
            "optimizer": {
                "learning_rate": self.lr,
                "warmup_steps": 0,
                "updates_per_step": self.episodes_per_step // self.batch_size,
            },
            "evaluation": {"every": self.steps, "problems": self.num_problems},
        }
        values = {"seeds": self.seeds, "baseline": "baseline", "alpha": self.alpha, "base": base, "arms": self.arms()}
        return check_campaign(values, "sepa_campaign")

    def arms(self) -> dict[str, dict[str, Any]]:
        """Two recipes with their settings."""
        pooling = {
            "steps": self.candidate_sepa_steps,
            "schedule": self.candidate_sepa_schedule,
            "delay_steps": self.candidate_sepa_delay_steps,
            "correct_rate_gate": self.candidate_sepa_correct_rate_gate,
        }
        first: dict[str, Any] = {"name": "hicra", "hicra_alpha": self.baseline_hicra_gamma}
        second: dict[str, Any] = {"name": "sepa", "sepa": pooling}
        if self.advantage_mode == "maxrl":
            first, second = {"name": "maxrl"}, {**first, **second, "name": "full"}
        return {"baseline": {"algorithm": first}, "candidate": {"algorithm": second}}


def run(asked: SEPACampaignArguments) -> int:
    """Write the plan; with ``execute`` train, compare and report. Returns the exit code."""
    profile = get_sepa_litmus_profile(asked.litmus_profile)
    settings = asked.settings()
    root = asked.campaign_root or Path(f"results/sepa_campaign_{time.strftime('%Y%m%d_%H%M%S')}")
    write_plan(settings, root)
    jobs = jobs_of(settings, root)
    if not asked.execute:
        print(f"{len(settings.arms)} arms x {len(settings.seeds)} seeds, planned in {root}; nothing was run")
        return 0
    carry_out(jobs, root, parallel=asked.parallel, continue_on_error=asked.continue_on_error)
    completed = all(job.done for job in jobs)
    write_manifest(settings, root, "completed" if completed else "partial")
    if not completed:
        print(f"partial: {root}; the same command goes on")
        return 1
    least = asked.litmus_min_run_pairs or profile.evidence.run_pairs
    found = find(settings, root, jobs)
    write_report(found, root)
    write_sepa_pages(asked, found, jobs, root, replace(profile, evidence=replace(profile.evidence, run_pairs=least)))
    print(found.verdict)
    return 0


def write_sepa_pages(
    asked: SEPACampaignArguments, found: Findings, jobs: Sequence[Job], root: Path, profile: SEPALitmusProfile
) -> None:
    """analysis/{litmus,significance,dynamics}.{json,md}."""
    arms = [[job.folder for job in jobs if job.arm == arm] for arm in ("baseline", "candidate")]
    litmus = evaluate_sepa_litmus(*arms, thresholds=profile.thresholds, evidence=profile.evidence)
    significance = evaluate_sepa_significance(
        *arms, alpha=asked.alpha, num_resamples=asked.resamples, paired=len(asked.seeds) > 1
    )
    pages = {
        "litmus": (litmus.to_dict(), build_litmus_markdown(litmus)),
        "significance": (significance.to_dict(), build_sepa_significance_markdown(significance)),
        "dynamics": (dynamics(found), dynamics_markdown(found)),
    }
    for name, (values, page) in pages.items():
        write_whole(root / "analysis" / f"{name}.json", json.dumps(values, indent=2) + "\n")
        write_whole(root / "analysis" / f"{name}.md", page)


def dynamics(found: Findings) -> dict[str, Any]:
    """The held-out curve of each arm, over its seeds."""
    return {
        arm.name: [
            {"step": step, "mean": sum(v) / len(v), "lowest": min(v), "highest": max(v)} for step, v in curve_of(arm)
        ]
        for arm in found.arms
    }


def dynamics_markdown(found: Findings) -> str:
    """The same as a page."""
    lines = [
        "# Held-out accuracy by step",
        "",
        "| arm | step | mean | lowest seed | highest seed |",
        "|---|---|---|---|---|",
    ]
    for arm, points in dynamics(found).items():
        lines += [f"| {arm} | {p['step']} | {p['mean']:.1%} | {p['lowest']:.1%} | {p['highest']:.1%} |" for p in points]
    return "\n".join(lines) + "\n"
