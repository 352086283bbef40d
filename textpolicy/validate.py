"""``textpolicy validate``: is this installation fit to train, and if not, what is to be done."""

from __future__ import annotations

import json
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from .errors import MissingDependencyError

Check = dict[str, Any]  # facts by name; "advice" is a sentence, "error" one that makes the check fail
USAGE = "usage: textpolicy validate [--json]"


def validate_installation(verbose: bool = True) -> dict[str, Any]:
    """Check this installation, print the findings if ``verbose``, and return them.

    The dict holds status ("ok" or "fail"), checks (facts by name) and errors (sentences). Only a
    missing mlx or a broken environment contract is a failure; a slow BLAS, or a missing mlx-lm or
    built-in model, comes with advice.
    """
    checks = {name: check() for name, check in CHECKS.items()}
    errors = [f"{name}: {facts.pop('error')}" for name, facts in checks.items() if "error" in facts]
    report = {"status": "fail" if errors else "ok", "checks": checks, "errors": errors}
    if verbose:
        print(describe(report))
    return report


def main(arguments: Sequence[str]) -> int:
    """The command. Returns 0 if all is well, 1 if a check failed, 2 for arguments it does not know."""
    if set(arguments) & {"-h", "--help"}:
        print(USAGE)
        return 0
    if unknown := [a for a in arguments if a != "--json"]:
        print(f"textpolicy: validate does not take {unknown[0]!r}; {USAGE}", file=sys.stderr)
        return 2
    report = validate_installation(verbose=False)
    print(json.dumps(report, indent=2) if arguments else describe(report))
    return 0 if report["status"] == "ok" else 1


def describe(report: dict[str, Any]) -> str:
    """The report for people: a verdict, a line per check, then errors and advice."""
    checks = report["checks"]
    return "\n".join(
        [
            f"TextPolicy validation: {report['status']}",
            *(f"- {name}: {_facts(facts)}" for name, facts in checks.items()),
            *(f"error: {error}" for error in report["errors"]),
            *(f"advice: {facts['advice']}" for facts in checks.values() if "advice" in facts),
        ]
    )


def _facts(facts: Check) -> str:
    shown = {name: fact for name, fact in facts.items() if name != "advice"}
    return ", ".join(_fact(name, fact) for name, fact in shown.items())


def _fact(name: str, fact: Any) -> str:
    if isinstance(fact, bool):
        return name if fact else f"not {name}"
    return f"{name} {fact}"


# ---- the checks


def _python() -> Check:
    return {"version": platform.python_version(), "executable": sys.executable}


def _mlx() -> Check:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that BLAS is slow: it is measured and reported here
            from .mlx.probe import describe_mlx
    except MissingDependencyError as error:
        return {"available": False, "error": str(error)}
    return describe_mlx()


def _package(name: str, install: str = "") -> Check:
    if find_spec(name) is None:
        return {"available": False, **({"advice": install} if install else {})}
    return {"available": True, "version": version(name)}


def _mlx_lm() -> Check:
    return _package("mlx_lm", "to load models: pip install 'textpolicy[mlx]'")


def _gymnasium() -> Check:
    return _package("gymnasium")  # only its adapter needs it, so its absence is a fact and no advice


def _model() -> Check:
    try:
        from .mlx.probe import describe_models

        return describe_models()
    except MissingDependencyError:  # the check of mlx says why
        return {"available": False}
    except ModuleNotFoundError as error:
        return {"available": False, "advice": f"to load models ({error}): pip install 'textpolicy[mlx]'"}


def _environment_contract() -> Check:
    try:
        _play_one_episode()
    except Exception as error:  # noqa: BLE001 - whatever breaks is the finding
        return {
            "ok": False,
            "error": f"an episode of a tiny environment failed with {error!r}; install textpolicy again",
        }
    return {"ok": True}


def _play_one_episode() -> None:
    """Raises unless ``reset`` and ``step`` of a tiny environment keep their promises."""
    from .environment.single_turn import TextGenerationEnv
    from .rollout.base import STEP_KEYS, checked_step

    def length(prompt: str, completion: str, example: Any, **_: Any) -> float:
        return float(len(completion))

    env = TextGenerationEnv(["ab"], length, tokenizer=_Letters())
    observation, info = env.reset()
    result = checked_step(env, [99, 100, 101])
    found = (observation.tolist(), info["prompt_text"], sorted(result), result["reward"], result["terminated"])
    expected = ([97, 98], "ab", sorted(STEP_KEYS), 3.0, True)
    if found != expected:
        raise ValueError(f"it gave {found} instead of {expected}")


class _Letters:
    """A tokenizer whose tokens are letters."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


CHECKS: dict[str, Callable[[], Check]] = {
    "python": _python,
    "mlx": _mlx,
    "mlx_lm": _mlx_lm,
    "gymnasium": _gymnasium,
    "model": _model,
    "environment_contract": _environment_contract,
}
