"""Runs the vectors of pass@k and its relatives."""

from __future__ import annotations

from vectors import Answer, Case, UnknownCase, raised

from textpolicy.analysis import mean_pass_at_k, mean_pass_hat_k, pass_at_k, pass_hat_k, plug_in_pass_at_k

SINGLE = {"pass_at_k": pass_at_k, "pass_hat_k": pass_hat_k, "biased_plugin": plug_in_pass_at_k}
MEANS = {"mean": mean_pass_at_k, "mean_pass_at_k": mean_pass_at_k, "mean_pass_hat_k": mean_pass_hat_k}


def check(case: Case) -> list[Answer]:
    n, c = case.inputs["n"], case.inputs["c"]
    if "raises" in case.expected:
        return [Answer("raises", raised(lambda: pass_at_k(n, c, case.params["k"])))]
    if "ks" in case.params:
        ks = case.params["ks"]
        return [Answer(key, {str(k): mean(n, c, k) for k in ks}) for key, mean in MEANS.items() if key in case.expected]
    if "k" in case.params:
        k = case.params["k"]
        return [Answer(key, estimate(n, c, k)) for key, estimate in SINGLE.items() if key in case.expected]
    raise UnknownCase(case.id)
