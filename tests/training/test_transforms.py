"""The transforms of Trainer's advantages: hand-worked tables, and what they must never do to an outcome."""

import json
import logging

import numpy as np
import pytest

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx

from textpolicy.training.trainer import build_gtpo_hicra_transform, build_gtpo_transform

WORDS = ["x", "let", "me", "check", "Let"]


class Tokenizer:
    """Token i is the i-th word, with a space in front."""

    def decode(self, ids):
        return "".join(f" {WORDS[i]}" for i in ids)


# one prompt: a success of 2 tokens and a failure of 4 that plans with its last three; then a prompt that agrees
LENGTHS = [2, 4, 1, 1]
BATCH = {
    "act": [[0, 0, 0, 0], [0, 4, 2, 3], [0, 0, 0, 0], [0, 0, 0, 0]],
    "episode_lengths": LENGTHS,
    "rewards": [1.0, 0.0, 1.0, 1.0],
    "binary_rewards": [1.0, 0.0, 1.0, 1.0],
    "prompt_ids": [0, 0, 1, 1],
    "token_entropies": [1.0, 3.0, 2.0, 1.0, 1.0, 4.0, 0.5, 2.5],
    "logprob": [-2.0, -6.0, -4.0, -2.0, -2.0, -8.0, -1.0, -5.0],
}
ADVANTAGES = [0.5, 0.5, -0.5, -0.5, -0.5, -0.5, 0.0, 0.0]


@pytest.fixture(params=["numpy", "mlx"])
def array(request):
    return {"numpy": np.array, "mlx": mx.array}[request.param]


def batch(array=np.array, **changes):
    return {name: array(value) for name, value in {**BATCH, **changes}.items()}


def apply(transform, array=np.array, advantages=ADVANTAGES, **changes):
    out = transform(array(advantages), batch(array, **changes))
    assert isinstance(out, type(array([0.0])))
    return np.asarray(out)


# weights, then HICRA


def test_weights_and_amplification_worked_by_hand(array):
    """Means 2 and 2, beta 0.5: weights .75 1.25 | 1 .75 .75 1.5; then 0.9 on the failure's planning tokens."""
    transform = build_gtpo_hicra_transform(Tokenizer(), hicra_alpha=0.1, entropy_weight=0.5)
    wanted = [0.375, 0.625, -0.5, -0.375 * 0.9, -0.375 * 0.9, -0.75 * 0.9, 0, 0]
    assert np.allclose(apply(transform, array), wanted, atol=1e-6)


def test_surprisal_is_used_only_on_request():
    """Here it is twice the entropy, so the weights are the same; without entropies it is all there is."""
    exact = build_gtpo_hicra_transform(Tokenizer())
    guessed = build_gtpo_hicra_transform(Tokenizer(), uncertainty="surprisal")
    without = {k: v for k, v in batch().items() if k != "token_entropies"}
    assert np.allclose(guessed(np.array(ADVANTAGES), without), apply(exact))
    with pytest.raises(ValueError, match="let the policy return entropy"):
        exact(np.array(ADVANTAGES), without)


def test_grams_of_one_s_own_replace_the_built_in_ones():
    plain, own = (
        build_gtpo_hicra_transform(Tokenizer(), strategic_grams=g, entropy_weight=0.0) for g in ([], ["x let"])
    )
    assert np.allclose(apply(plain), ADVANTAGES)
    assert np.allclose(apply(own), [0.5, 0.5, -0.4, -0.4, -0.5, -0.5, 0, 0])


def test_no_gram_matches_across_two_completions():
    transform = build_gtpo_hicra_transform(Tokenizer(), strategic_grams=["let me"], entropy_weight=0.0)
    across = [[0, 1, 0, 0], [2, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert np.allclose(apply(transform, act=across), ADVANTAGES)


# GTPO's shaped rewards


def slow_gtpo(entropy, rewards):
    """Eq. 3, 5 and one normalisation over the prompt, token by token; entropies are one list per completion."""
    shaped = []
    for h, r in zip(entropy, rewards, strict=True):
        for t in range(len(h)):
            peers = [k for k, q in zip(entropy, rewards, strict=True) if (q > 0.5) == (r > 0.5) and len(k) > t]
            if r > 0.5:
                shaped.append(r + 0.1 * len(peers) * h[t] / sum(k[t] for k in peers))
            else:
                shaped.append(-1 - 0.1 * len(peers) * (1 / h[t]) / sum(1 / k[t] for k in peers))
    x = np.array(shaped)
    return (x - x.mean()) / x.std()


def three_prompts():
    rng = np.random.default_rng(3)
    lengths = rng.integers(1, 6, 9)
    entropy = [rng.uniform(0.1, 3, n) for n in lengths]
    rewards, prompts = [1.0, 0.0, 0.8, 0.0, 1.0, 0.0, 1.0, 0.2, 0.0], [0, 1, 0, 1, 2, 0, 1, 2, 2]
    made = {
        "episode_lengths": lengths,
        "rewards": np.array(rewards),
        "prompt_ids": np.array(prompts),
        "token_entropies": np.concatenate(entropy),
    }
    return made, lengths, entropy, rewards, np.array(prompts)


def test_gtpo_is_that_of_a_loop_over_each_prompt_alone():
    made, lengths, entropy, rewards, prompts = three_prompts()
    got = np.split(build_gtpo_transform()(np.zeros(lengths.sum()), made), np.cumsum(lengths)[:-1])
    for prompt in range(3):
        members = np.flatnonzero(prompts == prompt)
        wanted = slow_gtpo([entropy[i] for i in members], [rewards[i] for i in members])
        assert np.allclose(np.concatenate([got[i] for i in members]), wanted, rtol=1e-5)


def test_success_stays_above_failure_whatever_the_entropies(array):
    out = apply(build_gtpo_transform(), array)
    assert (out[:2] > 0).all()
    assert (out[2:6] < 0).all()
    assert out[6:].tolist() == [0, 0]


def test_one_success_beside_one_failure_is_not_erased():
    two = {"episode_lengths": [1, 1], "rewards": [1.0, 0.0], "prompt_ids": [0, 0], "token_entropies": [1.0, 1.0]}
    assert np.allclose(apply(build_gtpo_transform(), advantages=[0.0, 0.0], **two), [1, -1], rtol=1e-5)


def test_an_unscorable_completion_gets_no_credit_and_changes_no_other():
    unscored = {
        **{k: v for k, v in BATCH.items() if k != "act"},
        "episode_lengths": [*LENGTHS, 2],
        "rewards": [*BATCH["rewards"], np.nan],
        "binary_rewards": [*BATCH["binary_rewards"], np.nan],
        "prompt_ids": [*BATCH["prompt_ids"], 0],
        "token_entropies": [*BATCH["token_entropies"], 9.0, 9.0],
    }
    out = apply(build_gtpo_transform(), advantages=[*ADVANTAGES, 0.0, 0.0], **unscored)
    assert np.allclose(out, [*apply(build_gtpo_transform()), 0, 0])


def test_a_maxrl_base_keeps_its_signs_and_its_mean():
    """Weights .95 1.05 | 1 .95 .95 1.1 of beta 0.1: nothing signed multiplies anything signed."""
    base = [3.0, 3.0, -1.0, -1.0, -1.0, -1.0, 0.0, 0.0]
    out = apply(build_gtpo_transform(use_maxrl_base=True), advantages=base)
    assert np.allclose(out, [2.85, 3.15, -1, -0.95, -0.95, -1.1, 0, 0], rtol=1e-5)


# planning tokens that stand out


def test_boosted_planning_tokens_take_less_of_the_blame():
    """In a failure the share of blame falls as entropy grows."""
    plain, boosted = apply(build_gtpo_transform()), apply(build_gtpo_transform(tokenizer=Tokenizer(), hicra_gamma=0.5))
    alone = apply(build_gtpo_transform(tokenizer=Tokenizer(), hicra_gamma=0.5, use_maxrl_base=True))
    assert np.allclose(plain[2:6], boosted[2:6])  # the only failure of its prompt takes all of it
    # entropies 2 2 2 5 with gamma * mean = 1 added to three: mean 2.75, and beta is 0.1
    assert np.allclose(alone[2:6], -0.5 * (1 + 0.1 * (np.array([2, 2, 2, 5]) / 2.75 - 1)), rtol=1e-5)


def test_sepa_pools_the_tokens_that_are_not_planning():
    """At full strength the success's entropies 1 and 3 become 2 and 2: the ramp of one step is over in the second."""
    transform = build_gtpo_transform(tokenizer=Tokenizer(), sepa_steps=1, use_maxrl_base=True)
    first, second = apply(transform), apply(transform)
    assert np.allclose(first[:2], [0.475, 0.525], rtol=1e-5)
    assert np.allclose(second[:2], [0.5, 0.5], rtol=1e-5)
    assert np.allclose(second[2:6], first[2:6])  # three planned, and one alone is its own mean


def test_the_gate_of_sepa_opens_by_the_correct_rate_of_the_batch():
    transform = build_gtpo_transform(tokenizer=Tokenizer(), sepa_steps=4, sepa_correct_rate_gate=0.5)
    none = [0.0, 0.0, np.nan, 0.0]
    reports = []
    for correct in (none, none, BATCH["binary_rewards"], none, none):
        made = batch(binary_rewards=correct)
        transform(np.array(ADVANTAGES), made)
        transform.postprocess_batch(made)
        reports.append(made["transform_metrics"])
    assert [r["sepa_gate_open"] for r in reports] == [0, 0, 1, 1, 1]
    assert [r["sepa_lambda"] for r in reports] == [0, 0, 0, 0.25, 0.5]  # the ramp starts when the gate opens


def test_a_step_without_a_judged_completion_keeps_the_gate_shut():
    transform = build_gtpo_transform(tokenizer=Tokenizer(), sepa_steps=4, sepa_correct_rate_gate=0.5)
    apply(transform, binary_rewards=[np.nan] * 4)
    assert not transform.sepa.gate_open


def test_a_saved_transform_resumes_where_it_was():
    def build(**changes):
        return build_gtpo_transform(tokenizer=Tokenizer(), use_maxrl_base=True, **{"sepa_steps": 3, **changes})

    one, other = build(), build()
    apply(one)
    apply(one)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert apply(one).tolist() == apply(other).tolist()
    assert other.sepa.strength == pytest.approx(2 / 3)
    assert build_gtpo_transform().state_dict() == {}
    with pytest.raises(ValueError, match="build it as when saved"):
        build_gtpo_transform().load_state_dict(one.state_dict())


def test_a_boost_with_sepa_has_no_effect_and_logs_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        transform = build_gtpo_transform(tokenizer=Tokenizer(), sepa_steps=9, hicra_gamma=0.3, use_maxrl_base=True)
    assert "hicra_gamma is 0.3 and has no effect" in caplog.text
    assert np.allclose(apply(transform)[2:6], [-0.5, -0.475, -0.475, -0.55], rtol=1e-5)


# what cannot work


@pytest.mark.parametrize("planning", [{"sepa_steps": 5}, {"sepa_schedule": "auto"}, {"hicra_gamma": 0.3}])
def test_planning_tokens_cannot_be_found_without_a_tokenizer(planning):
    with pytest.raises(ValueError, match="got no tokenizer"):
        build_gtpo_transform(**planning)


@pytest.mark.parametrize(
    "wrong",
    [{"alpha_1": -1}, {"alpha_2": -0.1}, {"hicra_gamma": -1}, {"sepa_steps": -1}, {"sepa_schedule": "cosine"},
     {"sepa_delay_steps": -1}, {"sepa_correct_rate_gate": 2}, {"normalisation": "none"}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=r"set it|choose one"):
        build_gtpo_transform(tokenizer=Tokenizer(), **wrong)


@pytest.mark.parametrize("wrong", [{"hicra_alpha": -1}, {"entropy_weight": -1}, {"uncertainty": "logits"}])
def test_settings_of_the_other_transform_are_refused(wrong):
    with pytest.raises(ValueError, match="set it"):
        build_gtpo_hicra_transform(Tokenizer(), **wrong)


@pytest.mark.parametrize("name", ["episode_lengths", "rewards", "prompt_ids", "act", "binary_rewards"])
def test_a_missing_array_of_the_batch_is_named(name):
    transform = build_gtpo_transform(tokenizer=Tokenizer(), sepa_steps=2)
    with pytest.raises(ValueError, match=f"the batch has no {name}"):
        transform(np.array(ADVANTAGES), {k: v for k, v in batch().items() if k != name})


def test_entropies_of_another_number_of_tokens_are_refused():
    with pytest.raises(ValueError, match="8 advantages, 7 uncertainties"):
        apply(build_gtpo_transform(), token_entropies=[1.0] * 7)
