"""Follow a run's metrics.jsonl and log its training steps to Weights & Biases, as tinker/<name> over tinker/step.

    python scripts/tinker_wandb_follow.py --metrics-path RUN/metrics.jsonl [--project NAME] [--no-follow]

The run may be under way, on this or another machine that shares the file, or over. WANDB_MODE=offline keeps
everything here.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from textpolicy._system.extras import extra
from textpolicy.errors import TextPolicyError
from textpolicy.record.trackers import INSTALL
from textpolicy.record.trackers.follow import Follower, follow, log_new


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--metrics-path", type=Path, required=True, help="the metrics.jsonl to follow")
    parser.add_argument("--project", default="textpolicy-tinker", help="the project it is logged to")
    parser.add_argument("--entity", help="whose project; your default one if not given")
    parser.add_argument("--run-name", help="the run's name; the name of the file's folder if not given")
    parser.add_argument("--group", help="a group of runs that it belongs to")
    parser.add_argument("--poll-seconds", type=float, default=5.0, help="between reads of the file")
    parser.add_argument("--idle-timeout-seconds", type=float, default=600.0, help="without a new step, then it ends")
    parser.add_argument("--no-follow", action="store_true", help="log what is there and end")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    asked = arguments(argv)
    try:
        wandb = extra("wandb", INSTALL)
    except TextPolicyError as error:
        print(f"tinker_wandb_follow: {error}", file=sys.stderr)
        return 2
    name = asked.run_name or asked.metrics_path.absolute().parent.name
    try:
        begun = wandb.init(project=asked.project, entity=asked.entity, name=name, group=asked.group)
    except Exception as error:  # noqa: BLE001 - of wandb's settings, its service or its server
        reason = " ".join(str(error).split())
        advice = "log in with 'wandb login', or set WANDB_MODE=offline"
        print(f"tinker_wandb_follow: wandb cannot start a run ({reason}); {advice}", file=sys.stderr)
        return 2
    follower = Follower(asked.metrics_path)
    try:
        with begun as run:
            run.define_metric("tinker/step")
            run.define_metric("tinker/*", step_metric="tinker/step")
            if asked.no_follow:
                log_new(follower, run.log)
            else:
                follow(follower, run.log, asked.poll_seconds, asked.idle_timeout_seconds)
    except KeyboardInterrupt:
        print(f"tinker_wandb_follow: stopped by Ctrl-C, {len(follower.steps)} steps logged", file=sys.stderr)
        return 130
    print(f"{len(follower.steps)} steps logged")
    return 0


if __name__ == "__main__":
    sys.exit(main())
