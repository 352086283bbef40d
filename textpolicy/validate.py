"""Check that this installation can train, for ``textpolicy validate``, and advise where it cannot."""

from __future__ import annotations

import json
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from ._system.machine import how_to_install
from ._system.terminal import say
from .devices.launch import launched
from .errors import MissingDependencyError, TextPolicyError, UserError

Check = dict[str, Any]  # facts by name; "advice" is a sentence, "error" a sentence that fails the check
USAGE = "usage: textpolicy validate [--train] [--json]"


def validate_installation(verbose: bool = True, train: bool = False) -> dict[str, Any]:
    """Check this installation, print the findings if ``verbose``, and return them.

    With ``train`` some steps of training are tried, too, which takes half a minute.

    The dict holds status ("ok" or "fail"), checks (facts by name) and errors (sentences). Only an mlx
    that is installed and cannot be used, or a broken environment contract, is a failure; a slow BLAS, or a
    missing mlx, mlx-lm or built-in model, comes with advice, as rewards and algorithms need none of them.
    """
    checks = {name: check() for name, check in CHECKS.items()}
    if launched():
        checks["ranks"] = _ranks()
    if train:
        checks |= _train()
    errors = [f"{name}: {facts.pop('error')}" for name, facts in checks.items() if "error" in facts]
    report = {"status": "fail" if errors else "ok", "checks": checks, "errors": errors}
    if verbose:
        say(describe(report))
    return report


def main(arguments: Sequence[str]) -> int:
    """Check this installation: textpolicy validate [--train] [--json].

    Returns 0 if all is well, 1 if a check failed, 2 for unknown arguments.
    """
    if set(arguments) & {"-h", "--help"}:
        print(USAGE)
        return 0
    if unknown := [a for a in arguments if a not in ("--json", "--train")]:
        print(f"textpolicy: validate does not accept {unknown[0]!r}; {USAGE}", file=sys.stderr)
        return 2
    report = validate_installation(verbose=False, train="--train" in arguments)
    if report["checks"].get("ranks", {}).get("rank"):
        pass  # rank 0 says it
    elif "--json" in arguments:
        print(json.dumps(report, indent=2))
    else:
        say(describe(report))
    return 0 if report["status"] == "ok" else 1


def describe(report: dict[str, Any]) -> str:
    """Return the report for people: a verdict, a line per check, then errors and advice."""
    lines, advice = [f"TextPolicy validation: {report['status']}"], []
    for check, facts in report["checks"].items():
        shown = []
        for name, fact in facts.items():
            if name == "advice":
                advice.append(f"advice: {fact}")
            elif isinstance(fact, bool):
                shown.append(name if fact else f"not {name}")
            else:
                shown.append(f"{name} {fact}")
        lines.append(f"- {check}: {', '.join(shown)}")
    return "\n".join([*lines, *(f"error: {error}" for error in report["errors"]), *advice])


# ---- the checks


def _mlx() -> Check:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of a slow BLAS, which is measured and reported here
            from .mlx.probe import describe_mlx
    except MissingDependencyError as error:
        if isinstance(error.__cause__, ModuleNotFoundError):  # which nobody may have asked for
            return {"available": False, "advice": f"to train on this machine: {error}"}
        return {"available": False, "error": str(error)}
    return describe_mlx()


def _package(name: str, advice: str = "") -> Check:
    if find_spec(name) is None:
        return {"available": False, **({"advice": advice} if advice else {})}
    return {"available": True, "version": version(name)}


def _model() -> Check:
    try:
        from .mlx.probe import describe_models

        return describe_models()
    except MissingDependencyError:  # the check of mlx reports it
        return {"available": False}
    except ModuleNotFoundError as error:
        return {"available": False, "advice": f"to load models ({error}), {how_to_install('textpolicy[mlx]')}"}


def _ranks() -> Check:
    """Join the other ranks, and measure what connects them."""
    try:
        from .mlx.collectives import links

        rank, found = links()
    except (TextPolicyError, ModuleNotFoundError) as error:
        return {"ok": False, "error": str(error)}
    return {"rank": rank, **found}


def _train() -> dict[str, Check]:
    """Train a few steps; return the figures and, for whoever reads them elsewhere, all versions."""
    try:
        from .run.trial import trial

        figures, errors, versions = trial()
    except Exception as error:  # noqa: BLE001 - any failure is the finding
        return {
            "train": {"ok": False, "error": str(error) if isinstance(error, UserError) else f"it failed with {error!r}"}
        }
    figures = {name: float(f"{fact:.4g}") if type(fact) is float else fact for name, fact in figures.items()}
    failed = {"error": f"{'; '.join(errors)}; please report this, with --json"} if errors else {}
    return {"train": {"ok": not errors, **figures, **failed}, "versions": versions}


def _environment_contract() -> Check:
    """Play one episode of a tiny environment and compare its results with the contract."""

    def length(prompt: str, completion: str, example: Any, **_: Any) -> float:
        return float(len(completion))

    try:
        from .environment.single_turn import TextGenerationEnv
        from .rollout.base import STEP_KEYS, checked_step

        env = TextGenerationEnv(["ab"], length, tokenizer=_LetterTokenizer())
        observation, info = env.reset()
        result = checked_step(env, [99, 100, 101])
        found = (observation.tolist(), info["prompt_text"], sorted(result), result["reward"], result["terminated"])
        expected = ([97, 98], "ab", sorted(STEP_KEYS), 3.0, True)
        if found != expected:
            raise ValueError(f"it gave {found} instead of {expected}")
    except Exception as error:  # noqa: BLE001 - any failure is the finding
        return {
            "ok": False,
            "error": f"an episode of a tiny environment failed with {error!r}; install textpolicy again",
        }
    return {"ok": True}


class _LetterTokenizer:
    """The tokenizer with one token per character."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


CHECKS: dict[str, Callable[[], Check]] = {
    "python": partial(dict, version=platform.python_version(), executable=sys.executable),
    "mlx": _mlx,
    "mlx_lm": partial(_package, "mlx_lm", f"to load models, {how_to_install('textpolicy[mlx]')}"),
    "gymnasium": partial(_package, "gymnasium"),  # only its adapter needs it, so there is no advice
    "model": _model,
    "environment_contract": _environment_contract,
}
