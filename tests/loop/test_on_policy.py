"""The on-policy check: what it measures, and the defects it catches."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import make_tiny_engine, recipe

from textpolicy.engine import Sampling
from textpolicy.environment.single_turn import TextGenerationEnv
from textpolicy.errors import UserError
from textpolicy.loop.collect import collect
from textpolicy.loop.on_policy import OnPolicyCheck, measure
from textpolicy.loop.train import Schedule, train
from textpolicy.losses import Correction
from textpolicy.mlx.decode import decoder as decode
from textpolicy.mlx.read import context
from textpolicy.mlx.score import micro_batches as scoring


class Numbers:
    """A tokenizer whose text is the ids themselves."""

    eos_token_id = 0

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(str(i) for i in ids)


def environment():
    prompts = ["1 2 3 4", "3", "4 5 6 1 2 3", "2 2"]
    return TextGenerationEnv(prompts, lambda completion, **_: len(completion), max_tokens=12, tokenizer=Numbers())


def run(check, temperature=1.0, algorithm="grpo", **surrogate):
    rows = []
    ours = recipe(algorithm)
    train(
        make_tiny_engine(vocabulary=16),
        environment(),
        replace(ours, surrogate=replace(ours.surrogate, **surrogate)),
        schedule=Schedule(1e-3, steps=4),
        prompts_per_step=4,
        group_size=4,
        sampling=Sampling(max_tokens=12, temperature=temperature),
        check=check,
        on_step=lambda step, row, episodes: rows.append(row),
    )
    return rows


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gap_is_a_metric_from_step_0_on_and_tiny(temperature):
    rows = run(OnPolicyCheck(every=3), temperature)
    assert ["on_policy_gap_mean" in row for row in rows] == [True, False, False, True]
    assert 0 < rows[0]["on_policy_gap_mean"] <= rows[0]["on_policy_gap_max"] < 1e-4
    assert 0 <= rows[0]["on_policy_kl"] < 1e-6


def test_how_far_a_step_moved_the_policy_is_a_metric_of_the_same_steps():
    rows = run(OnPolicyCheck(every=3))
    assert ["update_logprob_change" in row for row in rows] == [True, False, False, True]
    assert all(row["update_logprob_change"] > 10 * row["on_policy_gap_mean"] for row in rows[::3] if row["updated"])
    assert all(row["update_kl"] > 0 for row in rows[::3])


def test_the_check_can_be_switched_off():
    assert not any("on_policy_gap_mean" in row for row in run(OnPolicyCheck(every=0)))


def test_the_gap_is_that_of_the_logprobs_stored(tiny_engine):
    env = TextGenerationEnv(["1 2", "3"], lambda **_: 0.0, max_tokens=6, tokenizer=Numbers())
    episodes = collect(tiny_engine, env, [0, 1], 3, Sampling(max_tokens=6))
    shifted = [replace(e, logprobs=np.where(e.mask, e.logprobs - 0.25, 0).astype(np.float32)) for e in episodes]
    gap = measure(tiny_engine, shifted)
    assert (gap.mean, gap.maximum) == pytest.approx((0.25, 0.25), abs=1e-4)
    assert gap.kl == pytest.approx(np.exp(0.25) - 1.25, abs=1e-4)
    assert gap.tokens == sum(int(e.mask.sum()) for e in episodes)


def test_completions_without_a_token_have_no_gap(tiny_engine):
    env = TextGenerationEnv(["1 2"], lambda **_: 0.0, max_tokens=6, tokenizer=Numbers())
    [episode] = collect(tiny_engine, env, [0], 1, Sampling(max_tokens=6))
    silent = replace(episode, mask=np.zeros_like(episode.mask))
    gap = measure(tiny_engine, [silent, silent])
    assert (gap.mean, gap.maximum, gap.kl, gap.tokens) == (0, 0, 0, 0)
    assert measure(tiny_engine, [silent, episode]).tokens == episode.mask.sum()


def ignore_temperature(monkeypatch):
    exact = scoring.token_logprobs

    def colder(split, hidden, targets, temperatures, **settings):
        return exact(split, hidden, targets, 0 * temperatures + 1, **settings)

    monkeypatch.setattr(scoring, "token_logprobs", colder)


def drop_the_stop_token(monkeypatch):
    exact = decode._Decoder.run

    def shorter(decoder):
        return [
            c
            if c.truncated or len(c.tokens) < 2
            else replace(c, tokens=c.tokens[:-1], logprobs=c.logprobs[:-1], entropy=c.entropy[:-1])
            for c in exact(decoder)
        ]

    monkeypatch.setattr(decode._Decoder, "run", shorter)


def shift_the_mask(monkeypatch):
    import mlx.core as mx

    exact = context.Context.mask

    def shifted(*arguments, **keywords):
        mask = exact(*arguments, **keywords)
        return mx.roll(mask, 1, axis=-1) if isinstance(mask, mx.array) else mask

    monkeypatch.setattr(context.Context, "mask", shifted)


@pytest.mark.parametrize(
    ("defect", "temperature", "message"),
    [
        (ignore_temperature, 0.7, r"differ from the sampler's by .* check that scoring applies the temperature 0.7"),
        (drop_the_stop_token, 1.0, "which is not a stop token"),
        (shift_the_mask, 1.0, "differ from the sampler's by"),
    ],
)
def test_a_defect_of_the_engine_stops_the_run_before_anything_is_updated(monkeypatch, defect, temperature, message):
    defect(monkeypatch)
    with pytest.raises(UserError, match=message):
        run(OnPolicyCheck(), temperature)


def test_with_a_correction_a_large_gap_is_reported_and_training_continues(monkeypatch):
    ignore_temperature(monkeypatch)
    rows = run(OnPolicyCheck(corrected=True), 0.5, correction=Correction("token", "truncate", high=2.0))
    assert rows[0]["on_policy_gap_mean"] > 0.05
    assert "correction_mean" in rows[0]
