"""Each rule of the doctor: facts that trigger it, and facts that do not."""

import numpy as np
import pytest

from textpolicy.doctor import RULES, Completions, Evaluation, Facts, Settings, examine
from textpolicy.types import Completion, Episode

STEPS = 12


def row(step, **changed):
    """A step of a run that learns: rewards rise, groups disagree, little is cut off."""
    return {
        "step": step,
        "learning_rate": 3e-4,
        "reward_mean": 0.2 + 0.05 * step + 0.01 * (step % 2),
        "reward_std": 0.4,
        "unscorable": 0.0,
        "frac_reward_zero_std": 0.2,
        "accuracy": 0.1 + 0.05 * step,
        "length_mean": 4.0,
        "truncated": 0.05,
        "entropy": 0.8 - 0.04 * step,
        "prompt_draws": 1.0,
        "batch_full": 1.0,
        "loss": 0.01 * (1 + step % 3),
        "grad_norm": 0.5,
        "updated": 1.0,
        "sampler_kl": 1e-9,
        "clip_fraction_low": 0.0,
        "clip_fraction_high": 0.0,
        "on_policy_gap_mean": 1e-5,
        "on_policy_kl": 1e-9,
        "update_logprob_change": 0.1,
        **changed,
    }


def rows(steps=STEPS, **changed):
    """Steps with columns replaced: a number, or a function of the step."""
    return [row(s, **{k: v(s) if callable(v) else v for k, v in changed.items()}) for s in range(steps)]


def episode(text="7", reward=1.0, group=0, correct=True, truncated=False, prompt=None, **scores):
    completion = Completion(np.array([4, 5, 6], np.int32), np.zeros(3, np.float32), truncated=truncated)
    return Episode.from_completion(
        [1, 2], completion, reward=reward, group=group, text=text, is_correct=correct, scores=scores,
        prompt=f"prompt {group}" if prompt is None else prompt,
    )  # fmt: skip


def various(groups=8, size=4):
    """Completions of a healthy step: right and wrong ones in each group, hardly any text twice."""
    return [
        episode(f"{7 * g + (0 if i % 2 else i + 1)}", float(i % 2), g, bool(i % 2))
        for g in range(groups)
        for i in range(size)
    ]


def falls(to):
    return lambda step: 0.8 if step < 4 else to


def facts(rows=None, episodes=None, evaluations=(), **settings):
    given = rows if rows is not None else globals()["rows"]()
    recorded = Completions.of([(STEPS - 1, various() if episodes is None else episodes)])
    return Facts(given, evaluations, recorded, settings=Settings(**settings))


def held_out(*right, total=100):
    return [Evaluation(4 * n, "validation", r, total) for n, r in enumerate(right)]


def found(case):
    return [finding.name for finding in examine(case).findings]


HEALTHY = facts(evaluations=held_out(10, 40, 60), updates_per_step=1, max_tokens=8, max_gap=0.05)


def test_a_run_that_learns_has_no_finding_and_only_the_rule_on_several_rewards_is_not_checked():
    report = examine(HEALTHY)
    assert report.findings == ()
    assert [name for name, _ in report.blind] == ["one_part_dominates"]
    assert len(report.looked) == len(RULES) - 1


IDLE = {"updated": 0.0, "frac_reward_zero_std": 1.0, "reward_std": 0.0, "grad_norm": 0.0}
SAME_TEXT = [episode("12" if i % 8 else "13", 0.4, g, False) for g in range(4) for i in range(8)]
LOOPS = [episode("I think so too. " * 8, 0.1, g, False) for g in range(8)]
PAID_ALIKE = [episode(str(g), 0.1, g, False) for g in range(8)]  # and none less
FORM = [episode(str(10 * g + i), 0.1 if i else 0.0, g, False) for g in range(4) for i in range(8)]


def two_rewards(weight):
    """Reward = right + weight * bare; both are there in half of each group."""
    return [
        episode(f"{g} {i}", i % 2 + weight * (i // 2 % 2), g, bool(i % 2), right=float(i % 2), bare=float(i // 2 % 2))
        for g in range(8) for i in range(4)
    ]  # fmt: skip


DECIDED = Facts(  # by the end no completion is bare
    rows(),
    completions=Completions.of([(STEPS - 1, [episode(f"{i}", 1.0, i, right=1.0, bare=0.0) for i in range(8)])]),
    early=Completions.of([(0, two_rewards(0.01))]),
)
SEVERAL = {"updates_per_step": 4}


def ranks(*waited):
    """The columns of a step of 6 s in which each rank waited so many seconds, all while sampling."""
    of_ranks = {f"rank_{n}_{name}": value for n, seconds in enumerate(waited) for name, value in (
        ("tokens_per_second", 100.0), ("waited_sampling", seconds), ("waited_updating", 0.0))}  # fmt: skip
    return {"wall_seconds": 6.0, "scaling": 0.7, **of_ranks}


TRIGGERS = {
    "no_gradient": [
        facts(rows(**IDLE, reward_mean=0.25, accuracy=0.4)),
        facts(rows(updated=0.0, truncated=0.9, grad_norm=0.0)),  # groups disagree, and everything is masked
    ],
    "reward_constant": [
        facts(rows(**IDLE, reward_mean=0.25, accuracy=0.4)),
        facts(rows(**IDLE, reward_mean=0.25, accuracy=0.0)),  # pays for what is wrong
        facts([{k: v for k, v in r.items() if k != "accuracy"} for r in rows(**IDLE, reward_mean=0.5)]),
    ],
    "all_fail": [
        facts(rows(**IDLE, reward_mean=0.0, accuracy=0.0)),
        facts(rows(frac_reward_zero_std=0.9, accuracy=0.01, reward_mean=lambda s: 0.01 * (s % 2))),
    ],
    "all_pass": [
        facts(rows(**IDLE, reward_mean=1.0, accuracy=1.0)),
        facts(rows(frac_reward_zero_std=0.9, accuracy=0.98, reward_mean=0.98)),
    ],
    "all_truncated": [facts(rows(**IDLE, reward_mean=0.0, accuracy=0.0, truncated=1.0), max_tokens=4)],
    "groups_agree": [facts(rows(frac_reward_zero_std=0.9, accuracy=0.5))],
    "not_finite": [facts(rows(skipped=lambda s: float(s == 3)))],
    "unscorable": [facts(rows(unscorable=0.04))],
    "short_batches": [facts(rows(batch_full=lambda s: float(s < 3), prompt_draws=4.0))],
    "stop_never_learned": [facts(rows(truncated=0.99), max_tokens=8)],
    "truncation": [facts(rows(truncated=0.4))],
    "empty_completions": [facts(episodes=[*various(), *(episode("  ", 0.0, g, False) for g in range(8))])],
    "repeated_completions": [
        facts(episodes=SAME_TEXT),
        facts(episodes=[episode("yes", 1.0, g, None) for g in range(8)]),  # the reward does not say that it is right
    ],
    "looping_completions": [facts(episodes=LOOPS)],
    "entropy_collapse": [
        facts(rows(entropy=falls(0.01), frac_reward_zero_std=0.7, accuracy=0.2)),
        facts(rows(entropy=0.02, frac_reward_zero_std=0.6, accuracy=0.5)),  # sure from the first step
    ],
    "format_without_answers": [
        facts(rows(accuracy=lambda s: 0.02 * (s % 2), reward_mean=0.09), FORM),
        facts(rows(accuracy=0.02, reward_mean=0.09), FORM, held_out(20, 22)),
    ],
    "one_part_dominates": [facts(episodes=two_rewards(0.01)), DECIDED],
    "on_policy_gap": [facts(rows(on_policy_gap_mean=0.2), max_gap=1.0)],
    "clips_most": [facts(rows(clip_fraction_low=0.3, clip_fraction_high=0.3), **SEVERAL)],
    "clips_nothing": [facts(rows(sampler_kl=1e-7), **SEVERAL)],
    "held_up": [facts(rows(**ranks(3.0, 0.1))), facts(rows(**ranks(0.0, 1.0, 2.0)))],
    "held_out_falls": [facts(evaluations=held_out(40, 60, 20))],
    "learning_rate_high": [
        facts(rows(update_logprob_change=lambda s: 2.0 if s == 4 else 0.1)),
        facts(rows(sampler_kl=lambda s: 0.5 if s == 4 else 0.01), **SEVERAL),
        facts(rows(loss=lambda s: 5.0 if s == 4 else 0.01, sampler_kl=0.05), **SEVERAL),
        facts(rows(reward_mean=lambda s: 0.7 - 0.05 * s), evaluations=held_out(40, 60, 10)),
    ],
    "learning_rate_low": [facts(rows(update_logprob_change=1e-4, learning_rate=1e-8))],
}
SPARES = {
    "no_gradient": [facts(rows(updated=lambda s: float(s > 6), frac_reward_zero_std=lambda s: float(s <= 6)))],
    "reward_constant": [
        facts(rows(**IDLE, reward_mean=0.0, accuracy=0.0)),  # all fail
        facts(rows(**IDLE, reward_mean=lambda s: float(s % 2), accuracy=lambda s: float(s % 2))),
    ],
    "all_fail": [facts(rows(accuracy=0.02)), facts(rows(**IDLE, reward_mean=0.0, accuracy=0.0, truncated=1.0))],
    "all_pass": [facts(rows(accuracy=0.99, frac_reward_zero_std=0.7))],  # a fifth of the groups still teaches
    "all_truncated": [facts(rows(truncated=1.0))],
    "groups_agree": [
        facts(rows(updated=lambda s: float(s % 4 > 0), frac_reward_zero_std=lambda s: float(s % 4 == 0))),
        facts([{k: v for k, v in {**r, **IDLE, "unscorable": 1.0}.items() if k[:7] != "reward_"} for r in rows()]),
    ],
    "not_finite": [facts(rows(skipped=0.0))],
    "unscorable": [facts(rows(unscorable=lambda s: 0.01 * (s == 3)))],
    "short_batches": [facts(rows(batch_full=lambda s: float(s < 8)))],  # at the end it knows most of the task
    "stop_never_learned": [facts(rows(truncated=lambda s: 1.0 if s < 6 else 0.2))],
    "truncation": [facts(rows(truncated=lambda s: 0.9 if s < 6 else 0.1)), facts(rows(truncated=0.99))],
    "empty_completions": [facts(episodes=[*various(), episode("", 0.0, 3, False)])],
    "repeated_completions": [
        facts(episodes=[episode("yes", 1.0, g, True) for g in range(8)]),  # and that is right
        facts(episodes=[episode("yes" if g % 2 else "no", 0.0, g, None) for g in range(8)]),
        facts(episodes=[episode("12", 0.0, 0, False) for _ in range(8)]),  # one prompt
    ],
    "looping_completions": [
        facts(episodes=[episode("ha ha ha", 0.0, g, False) for g in range(8)]),  # too short to say
        facts(
            episodes=[
                episode("First add 3 and 9, which is 12; then take 4 away and get 8. The answer is 8.", g)
                for g in range(8)
            ]
        ),
    ],
    "entropy_collapse": [
        facts(rows(entropy=falls(0.01), frac_reward_zero_std=0.7, accuracy=0.95)),  # it has learned
        facts(rows(entropy=falls(0.06), frac_reward_zero_std=0.3, accuracy=0.5)),  # groups still disagree
    ],
    "format_without_answers": [
        facts(rows(reward_mean=0.09), FORM),  # accuracy rises
        facts(rows(accuracy=0.02, reward_mean=0.09), FORM, held_out(20, 45)),  # or that of held-out problems
        facts(rows(accuracy=0.02, reward_mean=0.1), PAID_ALIKE),
    ],
    "one_part_dominates": [
        facts(episodes=two_rewards(0.5)),
        facts(episodes=two_rewards(0.0)),  # only watched
        facts(episodes=[episode("", i % 2 + 0.01, 0, right=float(i % 2), bare=1.0) for i in range(8)]),
    ],
    "on_policy_gap": [facts(rows(on_policy_gap_mean=0.02))],  # half precision
    "clips_most": [facts(rows(clip_fraction_low=0.05, clip_fraction_high=0.15), **SEVERAL)],
    "clips_nothing": [facts(rows(), updates_per_step=1), facts(rows(sampler_kl=0.01), **SEVERAL)],
    "held_up": [facts(rows()), facts(rows(**ranks(1.0, 0.5)))],  # one rank alone, and two that wait a little
    "held_out_falls": [
        facts(evaluations=held_out(40, 60, 55)),  # within chance
        facts(
            rows(reward_mean=lambda s: 0.5 + 0.01 * (s % 2)), evaluations=held_out(40, 60, 20)
        ),  # the reward does not rise
    ],
    "learning_rate_high": [
        facts(rows(sampler_kl=0.5)),  # one update per step: that is another sampler, not the rate
        facts(rows(sampler_kl=0.5, on_policy_gap_mean=0.3), **SEVERAL),
        facts(rows(loss=lambda s: 5.0 if s == 4 else 0.01), **SEVERAL),  # a large advantage, no large ratio
        facts(evaluations=held_out(40, 60, 10)),  # the reward rises: it is the reward that is wrong
    ],
    "learning_rate_low": [
        facts(rows(update_logprob_change=0.02)),
        facts(rows(learning_rate=lambda s: 1e-9 if s == 0 else 3e-4, update_logprob_change=1e-6)),  # warming up
    ],
}


def test_every_rule_has_both_kinds_of_facts():
    assert {rule.name for rule in RULES} == set(TRIGGERS) == set(SPARES)


def cases(table):
    return [
        pytest.param(name, case, id=f"{name}-{n}") for name, listed in table.items() for n, case in enumerate(listed)
    ]


@pytest.mark.parametrize(("name", "case"), cases(TRIGGERS))
def test_a_rule_finds_its_fault(name, case):
    [finding] = [finding for finding in examine(case).findings if finding.name == name]
    assert finding.what.endswith(".")
    assert finding.change
    assert finding.change[-1] != "."
    assert finding.evidence
    assert all(np.isfinite(value) for value in finding.evidence.values())


@pytest.mark.parametrize(("name", "case"), cases(SPARES))
def test_a_rule_spares_runs_that_only_resemble_its_fault(name, case):
    assert name not in found(case)


def test_one_cause_has_one_name():
    agreement = {"reward_constant", "all_fail", "all_pass", "all_truncated", "groups_agree"}
    for name in agreement:
        for case in TRIGGERS[name]:
            assert agreement.intersection(found(case)) == {name}


def test_a_run_that_often_could_not_learn_reports_how_often():
    case = facts(
        rows(updated=lambda s: float(s % 2), frac_reward_zero_std=lambda s: float(s % 2 == 0), reward_mean=0.5)
    )
    [finding] = examine(case).findings
    assert finding.name == "groups_agree"
    assert "6 of 12 steps had no gradient at all" in finding.what
    assert "(mean always 0.5)" in finding.what


def test_a_rule_without_its_facts_gives_the_reason_and_does_not_guess():
    known = {"step", "learning_rate", "reward_mean", "reward_std", "unscorable", "frac_reward_zero_std", "truncated",
             "length_mean", "prompt_draws", "batch_full", "updated", "loss"}  # fmt: skip
    old = Facts([{k: v for k, v in r.items() if k in known} for r in rows(3)])
    blind = dict(examine(old).blind)
    assert blind["empty_completions"] == "its completions are not recorded"
    assert blind["entropy_collapse"] == "its metrics have no entropy"
    assert blind["held_out_falls"] == "it was not evaluated twice on validation problems"
    assert blind["learning_rate_low"] == "its metrics have no update_logprob_change"
    assert set(blind).isdisjoint(examine(old).looked)


def test_a_run_without_a_step_has_no_finding():
    report = examine(Facts([]))
    assert (report.findings, report.looked) == ((), ())
    assert len(report.blind) == len(RULES)


def test_examples_are_the_latest_of_different_groups():
    recorded = Completions.of([(3, various()), (4, various())])
    shown = recorded.examples(np.array([text == "7" for text in recorded.text]))
    assert [(e.step, e.prompt) for e in shown] == [(4, "prompt 1"), (3, "prompt 1")]


def test_who_waits_for_whom_while_what_is_said():
    [finding] = [f for f in examine(facts(rows(**ranks(0.3, 3.0, 2.0)))).findings if f.name == "held_up"]
    assert "Rank 1 waits 50% of the time" in finding.what
    assert "while others are sampling, and rank 0 for 5%: rank 0 holds the others up." in finding.what


def test_the_weights_of_rewards_follow_from_their_sum():
    [finding] = [f for f in examine(facts(episodes=two_rewards(0.01))).findings if f.name == "one_part_dominates"]
    assert finding.evidence == pytest.approx({"spread/right": 0.5, "spread/bare": 0.005})
    assert "bare (1.0% of its spread)" in finding.what


def episodes_of(reward):
    """Right and bare as above, and a reward made of them in some way."""
    pairs = [(g, i, i % 2, i // 2 % 2) for g in range(8) for i in range(4)]
    return [episode(f"{g} {i}", reward(r, b), g, bool(r), right=float(r), bare=float(b)) for g, i, r, b in pairs]


def test_no_reward_dominates_where_the_total_is_not_a_sum_of_them():
    assert "one_part_dominates" in found(facts(episodes=episodes_of(lambda r, b: r + 0.01 * b)))
    for other in (lambda r, b: r * b, lambda r, b: float("nan")):  # of parts multiplied, and where nothing was scored
        report = examine(facts(episodes=episodes_of(other)))
        assert "one_part_dominates" in report.looked
        assert "one_part_dominates" not in [finding.name for finding in report.findings]


def test_every_rule_describes_its_fault_in_a_sentence():
    for rule in RULES:
        sentence = getattr(rule.check, "func", rule.check).__doc__
        assert sentence.startswith("Find ")
        assert sentence.endswith(".")
        assert "\n" not in sentence


@pytest.mark.parametrize(
    ("changed", "cause"),
    [
        ({"accuracy": 1.0, "reward_mean": 1.0}, "all_pass"),
        ({"accuracy": 0.97, "reward_mean": lambda s: 0.9 + s / 1000}, "all_pass"),
        ({"accuracy": 0.0, "reward_mean": 0.5}, "reward_constant"),
        ({"accuracy": 0.4, "reward_mean": 2.0}, "reward_constant"),
        ({"accuracy": None, "reward_mean": 1.0}, "reward_constant"),
        ({"accuracy": 0.0, "reward_mean": 0.0}, "all_truncated"),
        ({"accuracy": None, "reward_mean": 0.0}, "all_truncated"),
        ({"accuracy": None, "reward_mean": -1.0}, "all_truncated"),
        ({"accuracy": 0.3, "reward_mean": lambda s: 0.1 + s / 100}, "all_truncated"),
        ({"accuracy": 0.3, "reward_mean": lambda s: 0.1 + s / 100, "truncated": 0.5}, "groups_agree"),
        ({"accuracy": 0.0, "reward_mean": lambda s: s / 100, "truncated": 0.5}, "all_fail"),
    ],
)
@pytest.mark.parametrize("updated", [0.0, 1.0])
def test_the_cut_is_blamed_only_for_groups_that_agree_because_of_it(changed, cause, updated):
    columns = {"frac_reward_zero_std": 1.0, "reward_std": 0.0, "truncated": 1.0, "updated": updated, **changed}
    made = [{k: v for k, v in one.items() if v is not None} for one in rows(**columns)]
    named = {finding.name for finding in examine(Facts(made)).findings}
    assert named & {"reward_constant", "all_fail", "all_pass", "all_truncated", "groups_agree"} == {cause}


@pytest.mark.parametrize("seed", range(150))
def test_rows_of_another_shape_are_examined(seed):
    """Rows of other loops and older versions lack metrics, all or some of the time, and have odd values."""
    rng = np.random.default_rng(seed)
    lacks, sometimes = rng.random(2) ** 2
    always = {name for name in row(0) if name != "step" and rng.random() < lacks}
    odd = [0, 1, np.nan, np.inf, -1.0, 1e9]
    made = []
    for one in rows(int(rng.integers(1, 30))):
        left = {k: v for k, v in one.items() if k == "step" or (k not in always and rng.random() >= sometimes)}
        made.append({k: rng.choice(odd) if k != "step" and rng.random() < 0.1 else v for k, v in left.items()})
    report = examine(Facts(made, [Evaluation(0, "validation", 1, 10), Evaluation(5, "validation", 9, 10)]))
    assert len(report.looked) + len(report.blind) == len(RULES)
