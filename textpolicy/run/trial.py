"""Try a few steps of training with the built-in model, for ``textpolicy validate --train``: what holds on this machine.

Everything is what a run does: the same engine, plan of memory and on-policy check.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from ..config.recipe import configure
from ..config.settings import Config, MachineSettings
from ..engine import Sampling
from ..loop.on_policy import OnPolicyCheck, measure
from ..types import Episode
from .assembly import build_engine, versions

PROMPTS = ("The capital of France is a city on a river. Its name is", "Two and three are five, and five and four are")
GROUP, TOKENS = 4, 24  # completions of each prompt, and their length
MAX_CHANGE = 0.01  # of a compiled pass's gradient against one that is not, relative
MAX_PEAK = 1.1  # of memory against its prediction: on a busy machine arrays are let go of a little later
TASK = "arithmetic"


def trial(config: Config | None = None) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    """Return figures, a sentence for each limit that was passed, and versions; it takes half a minute.

    Three gradients of one batch (the second compiles the pass, unless the settings say otherwise), three updates of
    which two start alike, and two rollouts. Raises UserError where nothing can be trained.
    """
    from ..mlx.memory import Workload, preflight
    from ..mlx.trial import active_bytes, learn_twice

    config = config or Config(model="smollm2-135m", machine=MachineSettings(compile="on"))
    started, beside = time.perf_counter(), active_bytes()  # bytes that are not the trial's
    engine, tokenizer = build_engine(config)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    plan = preflight(engine, Workload(len(prompts), GROUP, max(map(len, prompts)), TOKENS))
    episodes, rollout = _rollout(engine, prompts)
    gap = measure(engine, episodes, len(episodes))
    recipe = configure(config)
    learnt = learn_twice(engine, recipe.credit(episodes), recipe.surrogate)
    figures = {
        "model": config.model,
        **engine.platform,
        "compiled": engine.compiled,
        "seconds": time.perf_counter() - started,
        "gap_mean_nats": gap.mean,
        "gap_max_nats": gap.maximum,
        **learnt,
        "update_predicted_gb": plan.update_bytes / 1e9,
        **rollout,
        "rollout_predicted_gb": plan.decode_bytes / 1e9,
    }
    for what in ("update", "rollout"):
        figures[f"{what}_peak_gb"] -= beside / 1e9
    return figures, list(_passed(figures)), versions(engine, TASK)


def _rollout(engine: Any, prompts: Sequence[Sequence[int]]) -> tuple[list[Episode], dict[str, float]]:
    """Return scored episodes, and figures of a rollout; the first of two compiles what a GPU needs."""
    from ..mlx.trial import measured

    for seed in (1, 2):
        groups, seconds, peak = measured(partial(engine.sample, prompts, GROUP, Sampling(TOKENS, seed=seed)))
    episodes = [
        Episode.from_completion(prompt, c, reward=float(k % 2), group=g)
        for g, (prompt, group) in enumerate(zip(prompts, groups, strict=True))
        for k, c in enumerate(group)
    ]
    tokens = sum(len(c.tokens) for group in groups for c in group)
    return episodes, {"rollout_tokens_per_second": tokens / seconds, "rollout_peak_gb": peak / 1e9}


def _passed(figures: dict[str, Any]) -> Sequence[str]:
    """Return a sentence for each limit that the ``figures`` pass."""
    most, found = OnPolicyCheck.max_gap, []
    if not figures["gap_mean_nats"] <= most:
        gap = f"{figures['gap_mean_nats']:.3g} nats on average (at most {figures['gap_max_nats']:.3g})"
        found.append(f"the learner's log-probs differ from the sampler's by {gap}, more than {most:g}")
    if not figures["gradient_change_when_compiled"] <= MAX_CHANGE:
        change = figures["gradient_change_when_compiled"]
        found.append(f"compiling changes the gradient by {change:.2g} of its size, more than {MAX_CHANGE:g}")
    if not figures["updated"]:
        found.append("an update was skipped, since its loss or gradient was not finite")
    if not figures["bit_for_bit"] and figures["device"].startswith("Device(cpu"):
        found.append(f"two equal updates on a CPU differ in {figures['first_difference']}")
    for what in ("update", "rollout"):
        peak, predicted = figures[f"{what}_peak_gb"], figures[f"{what}_predicted_gb"]
        if not peak <= MAX_PEAK * predicted:
            found.append(f"the peak memory of {what}s is {peak:.2f} GB, and {predicted:.2f} GB were predicted")
    return found
