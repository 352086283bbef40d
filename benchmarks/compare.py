"""Compare each benchmark's newest row with the row before it from the same machine and workload.

    python benchmarks/compare.py                 every benchmark in results/
    python benchmarks/compare.py peers cost      these two
    python benchmarks/compare.py --limit 0.3     allow figures to be 30% worse in place of 15%

Exits with 1 if a figure is worse by more than the limit. Rows written while other programs used the machine
differ by more than that; the load average of both rows is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from functools import reduce
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

# benchmark -> (what makes two rows the same workload, figures of which less is better)
WATCHED: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "adapters": (("kind",), ("update_seconds", "update_peak_bytes", "saved_bytes")),
    "cost": (
        ("model", "device", "dtype", "threads", "prompts", "prompt_tokens", "group", "completion_tokens", "rank"),
        ("seconds.sample", "seconds.update", "seconds.step", "peak_bytes"),
    ),
    "credit": (("recipe", "completions", "tokens"), ("tokens_ms.min", "credit_ms.min")),
    "decode_parts": (("rows", "prompt_tokens", "new_tokens", "threads"), ("step_milliseconds",)),
    "demo": (("task", "algorithm", "steps", "seed"), ("train_seconds", "peak_memory_bytes")),
    "graders": (("grader", "texts"), ("p50_ms", "p99_ms")),
    "peers": (
        ("workload", "peer", "model", "threads", "prompts", "group", "new_tokens"),
        ("seconds", "rollout_seconds", "update_seconds"),
    ),
    "planning_mask": (("completions", "tokens", "grams"), ("mask_seconds",)),
    "recording": (("steps",), ("recorder_share_of_step",)),
    "tinker_overhead": (("server", "prompts", "group", "tokens", "recipe"), ("overhead", "client_seconds")),
    "update_memory": (
        ("model", "dtype", "device", "rows", "prompt", "completion", "rank"),
        ("paths.textpolicy.peak_bytes", "paths.textpolicy.seconds"),
    ),
    "viewer": (("completions", "mean_tokens"), ("open_seconds", "record_seconds")),
}


def figure(row: dict[str, Any], path: str) -> Any:
    """Return the value at a dotted path, or None if the row has none."""
    return reduce(lambda value, key: value.get(key) if isinstance(value, dict) else None, path.split("."), row)


def compare(path: Path, limit: float) -> tuple[list[str], bool]:
    """Return a line per figure of the newest pairs of rows of a file, and whether one is worse than ``limit``."""
    workload, figures = WATCHED[path.stem]
    rows = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["machine"], *(json.dumps(figure(row, key)) for key in workload)].append(row)
    lines, worse = [], False
    for key, same in rows.items():
        if len(same) < 2:
            continue
        old, new = same[-2:]
        name = " ".join(value.strip('"') for value in key[1:])
        for wanted in figures:
            before, after = figure(old, wanted), figure(new, wanted)
            if not before or after is None:
                continue
            ratio = after / before
            worse |= ratio > 1 + limit
            lines.append(
                f"{'WORSE' if ratio > 1 + limit else 'ok':5}  {ratio:5.2f}  {path.stem}: {name}: {wanted} "
                f"{before:.4g} -> {after:.4g}  ({old['commit']} -> {new['commit']}, "
                f"load {old['load_average']:.1f} -> {new['load_average']:.1f})"
            )
    return lines, worse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmarks", nargs="*", metavar="BENCHMARK", help=f"one of {', '.join(WATCHED)}; all if none")
    parser.add_argument("--limit", type=float, default=0.15, help="share by which a figure may be worse (0.15)")
    args = parser.parse_args()
    if unknown := [name for name in args.benchmarks if name not in WATCHED]:
        parser.error(f"{unknown[0]!r} is not compared; choose from {', '.join(WATCHED)}")
    failed = False
    for name in args.benchmarks or WATCHED:
        lines, worse = compare(RESULTS / f"{name}.jsonl", args.limit)
        print(*lines or [f"{name}: no two rows of one machine and workload"], sep="\n")
        failed |= worse
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
