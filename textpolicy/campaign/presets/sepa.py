"""The script ``sepa_campaign.py``: SEPA against HICRA on countdown, over the same seeds, on this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from ..._system.files import write_whole
from ...analysis.sepa.litmus import (
    SEPALitmusProfile,
    build_litmus_markdown,
    evaluate_sepa_litmus,
    get_sepa_litmus_profile,
)
from ...analysis.sepa.significance import build_sepa_significance_markdown, evaluate_sepa_significance
from ...config.settings import NonNegative, Positive, PositiveInt
from ...errors import UserError
from ..findings import curve_of, find
from ..jobs import Job
from ..plan import jobs_of, write_manifest, write_plan
from ..report import write_report
from ..settings import CampaignSettings, check_campaign
from .scripts import CampaignArguments, Seeds, new_root, run_campaign


class SEPACampaignArguments(CampaignArguments):
    """Compare SEPA with HICRA on countdown, seed by seed; without --execute only the plan is written."""

    seeds: Seeds = tuple(range(101, 109))
    """The seeds of both arms."""
    model: str = "smollm2-135m"
    """Built-in name, folder or hub id."""
    steps: PositiveInt = 12
    """Training steps of each run."""
    num_problems: PositiveInt = 16
    """Held-out problems that every run is evaluated on."""
    episodes_per_step: PositiveInt = 8
    """Completions in each step."""
    group_size: Annotated[int, Field(ge=2)] = 4
    """Completions of each problem."""
    batch_size: PositiveInt = 8
    """Completions in each update."""
    max_tokens: PositiveInt = 128
    """Longest completion, in tokens."""
    temperature: Positive = 0.4
    """Sampling temperature."""
    lr: Positive = 5e-6
    """Learning rate of both arms."""
    advantage_mode: Literal["grpo", "maxrl"] = "grpo"
    """grpo compares the recipes hicra and sepa, maxrl the recipes maxrl and full."""
    baseline_hicra_gamma: NonNegative = 0.3
    """HICRA's strength in the baseline; with maxrl in the candidate, as the baseline has none."""
    candidate_sepa_steps: Annotated[int, Field(ge=0)] = 8
    """SEPA: steps of the ramp."""
    candidate_sepa_schedule: Literal["linear", "auto"] = "linear"
    """SEPA: linear, or as the variance of execution tokens falls."""
    candidate_sepa_delay_steps: Annotated[int, Field(ge=0)] = 0
    """SEPA: steps before the ramp."""
    candidate_sepa_correct_rate_gate: Annotated[float, Field(ge=0, le=1)] = 0.0
    """SEPA: nothing is pooled before a step has had this share of correct completions."""
    litmus_profile: str = "official_v1"
    """Thresholds of the litmus test."""
    litmus_min_run_pairs: Annotated[int, Field(ge=0)] = 0
    """Pairs of runs that the litmus test requires; the profile's if 0."""

    def settings(self) -> CampaignSettings:
        """Return the campaign. Raises UserError, also for seeds given twice and sizes that do not divide."""
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
        arms = {"baseline": {"algorithm": first}, "candidate": {"algorithm": second}}
        values = {"seeds": self.seeds, "baseline": "baseline", "alpha": self.alpha, "base": base, "arms": arms}
        return check_campaign(values, "sepa_campaign")


def run(args: SEPACampaignArguments) -> int:
    """Write the plan; with ``execute`` train, compare and report. Return the exit code."""
    profile = get_sepa_litmus_profile(args.litmus_profile)
    settings = args.settings()
    root = args.campaign_root or new_root("sepa_campaign")
    write_plan(settings, root)
    jobs = jobs_of(settings, root)
    return run_campaign(
        args,
        root,
        jobs,
        lambda status, attempts, analysis: write_manifest(settings, root, status),
        lambda: report(args, settings, jobs, root, profile),
    )


def report(
    args: SEPACampaignArguments, settings: CampaignSettings, jobs: Sequence[Job], root: Path, profile: SEPALitmusProfile
) -> dict[str, Any]:
    """Write the campaign's report and analysis/{litmus,significance,dynamics}.{json,md}; the manifest gets no more."""
    found = find(settings, root, jobs)
    write_report(found, root)
    arms = [[job.folder for job in jobs if job.arm == arm] for arm in ("baseline", "candidate")]
    evidence = replace(profile.evidence, run_pairs=args.litmus_min_run_pairs or profile.evidence.run_pairs)
    litmus = evaluate_sepa_litmus(*arms, thresholds=profile.thresholds, evidence=evidence)
    significance = evaluate_sepa_significance(
        *arms, alpha=args.alpha, num_resamples=args.resamples, paired=len(args.seeds) > 1
    )
    dynamics: dict[str, list[dict[str, float]]] = {}  # the held-out curve of each arm, over its seeds
    lines = [
        "# Held-out accuracy by step",
        "",
        "| arm | step | mean | lowest seed | highest seed |",
        "|---|---|---|---|---|",
    ]
    for arm in found.arms:
        points = [
            {"step": step, "mean": sum(v) / len(v), "lowest": min(v), "highest": max(v)} for step, v in curve_of(arm)
        ]
        dynamics[arm.name] = points
        for p in points:
            lines.append(f"| {arm.name} | {p['step']} | {p['mean']:.1%} | {p['lowest']:.1%} | {p['highest']:.1%} |")
    pages = {
        "litmus": (litmus.to_dict(), build_litmus_markdown(litmus)),
        "significance": (significance.to_dict(), build_sepa_significance_markdown(significance)),
        "dynamics": (dynamics, "\n".join(lines) + "\n"),
    }
    for name, (values, page) in pages.items():
        write_whole(root / "analysis" / f"{name}.json", json.dumps(values, indent=2) + "\n")
        write_whole(root / "analysis" / f"{name}.md", page)
    print(found.verdict)
    return {}
