"""Dynamic sampling: refilled until the batch is full, in bounded draws, and reported over everything sampled."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from conftest import VOCABULARY, make_tiny_engine, recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_tokenizers import Numbers

from textpolicy.doctor import Facts
from textpolicy.doctor.gradient import short_batches
from textpolicy.engine import Sampling
from textpolicy.environment.single_turn import TextGenerationEnv
from textpolicy.loop.collect import collect, collect_informative, informative
from textpolicy.loop.curriculum import EveryPrompt
from textpolicy.loop.metrics import frac_reward_zero_std, summarize
from textpolicy.loop.train import Schedule, train
from textpolicy.types import Completion, Episode

NAN = float("nan")
UPDATE = {"loss": 0.1, "grad_norm": 1.0, "updated": 1.0, "peak_memory_bytes": 1.0}


class Draws:
    """Made-up draws of two prompts with two completions each; counts how often it is asked."""

    def __init__(self, *rewards):
        self.rewards, self.asked = rewards, []

    def __call__(self, n):
        self.asked.append(n)
        return [
            made_episode(reward, group=2 * n + g, text=f"{n}.{g}.{i}")
            for g, members in enumerate(self.rewards[n])
            for i, reward in enumerate(members)
        ]


def made_episode(reward, group, text="", **scored):
    completion = Completion(np.array([7, 8], np.int32), np.array([-1, -2], np.float32))
    return Episode.from_completion([3], completion, reward=reward, group=group, text=text, **scored)


def texts(episodes):
    return [e.text for e in episodes]


SPLIT, ALL, NONE = (1.0, 0.0), (1.0, 1.0), (0.0, 0.0)


def test_without_further_draws_the_step_is_trained_on_as_it_is():
    draws = Draws([ALL, SPLIT], [SPLIT, SPLIT])
    rollouts = collect_informative(draws, resample=0)
    assert draws.asked == [0]
    assert texts(rollouts.trained) == texts(rollouts.sampled) == ["0.0.0", "0.0.1", "0.1.0", "0.1.1"]
    assert rollouts.full


def test_a_full_first_draw_asks_for_no_other():
    draws = Draws([SPLIT, SPLIT])
    assert collect_informative(draws, resample=9).full
    assert draws.asked == [0]


def test_groups_that_agree_are_replaced_until_the_batch_is_full():
    draws = Draws([ALL, SPLIT], [NONE, ALL], [SPLIT, SPLIT], [SPLIT, SPLIT])
    rollouts = collect_informative(draws, resample=9)
    assert draws.asked == [0, 1, 2]
    assert texts(rollouts.trained) == ["0.1.0", "0.1.1", "2.0.0", "2.0.1"]  # whole groups, in the order drawn
    assert len(rollouts.sampled) == 12
    assert (rollouts.draws, rollouts.full) == (3, True)


def test_draws_are_bounded_and_training_then_gets_the_groups_found():
    draws = Draws([ALL, NONE], [SPLIT, ALL], [NONE, ALL])
    rollouts = collect_informative(draws, resample=2)
    assert draws.asked == [0, 1, 2]
    assert texts(rollouts.trained) == ["1.0.0", "1.0.1"]
    assert (rollouts.draws, rollouts.full) == (3, False)


def test_when_no_group_disagrees_the_first_draw_is_kept_and_not_counted_as_full():
    rollouts = collect_informative(Draws([ALL, NONE], [ALL, ALL]), resample=1)
    assert texts(rollouts.trained) == ["0.0.0", "0.0.1", "0.1.0", "0.1.1"]
    assert not rollouts.full
    assert not np.any(recipe("grpo").credit(rollouts.trained).advantages)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.lists(st.sampled_from([SPLIT, ALL, NONE]), min_size=2, max_size=2), min_size=5, max_size=5))
def test_however_groups_fall_no_more_is_drawn_than_needed_and_no_more_trained_on_than_one_draw(rewards):
    draws = Draws(*rewards)
    rollouts = collect_informative(draws, resample=4)
    found = np.cumsum([sum(group == SPLIT for group in drawn) for drawn in rewards])
    needed = int(np.argmax(found >= 2)) + 1 if found[-1] >= 2 else 5
    assert draws.asked == list(range(needed))
    assert rollouts.full == (found[-1] >= 2)
    if found[-1]:
        assert len(rollouts.trained) == 2 * min(found[-1], 2)
        assert all(Counter(e.group for e in rollouts.trained)[g] == 2 for g in {e.group for e in rollouts.trained})
        assert informative(rollouts.trained) == list(rollouts.trained)


@pytest.mark.parametrize(
    ("rewards", "kept"),
    [
        ((0.0, 1e-9), True),
        ((0.1 + 0.2, 0.3), True),
        ((1.0, NAN), False),  # one score says nothing of the other
        ((NAN, NAN), False),
        ((1.0,), False),
        ((1.0, NAN, 0.0), True),
    ],
)
def test_a_group_is_kept_where_two_scores_differ(rewards, kept):
    assert bool(informative([made_episode(r, group=4) for r in rewards])) == kept


def test_groups_disagree_in_the_signal_that_the_recipe_learns_from():
    """Rewards differ and correctness does not: nothing to learn where correctness is the signal."""
    episodes = [made_episode(r, group=0, is_correct=True) for r in (0.2, 0.9)]
    by_correctness = replace(recipe("dapo"), signal="correctness")
    assert not np.any(by_correctness.credit(episodes).advantages)
    drawn = []

    def draw(n):
        drawn.append(n)
        return [replace(e, group=n, is_correct=n == 0 or i == 0) for i, e in enumerate(episodes)]

    rollouts = collect_informative(draw, 3, by_correctness.signal_of)
    assert drawn == [0, 1]
    assert np.any(by_correctness.credit(rollouts.trained).advantages)


# ---- metrics


def test_metrics_are_those_of_everything_sampled():
    rollouts = collect_informative(Draws([ALL, ALL], [SPLIT, (NAN, 0.0)], [SPLIT, NONE]), resample=5)
    assert texts(rollouts.trained) == ["1.0.0", "1.0.1", "2.0.0", "2.0.1"]
    row = summarize(rollouts, [UPDATE], 1.0, 1.0)
    assert row["reward_mean"] == pytest.approx(6 / 11)  # and 1 / 2 of what was trained on
    assert row["unscorable"] == pytest.approx(1 / 12)
    assert row["frac_reward_zero_std"] == pytest.approx(4 / 6)
    assert row["sampled_tokens"] == 24
    assert (row["prompt_draws"], row["batch_full"]) == (3.0, 1.0)


def test_the_share_of_groups_that_agree_counts_groups_and_not_completions():
    episodes = [made_episode(r, g) for g, rewards in enumerate([(1, 1, 1, 1), (1, 0), (NAN, NAN)]) for r in rewards]
    assert frac_reward_zero_std(episodes) == pytest.approx(2 / 3)


def test_a_run_whose_batches_stayed_short_reports_it_with_the_number_of_draws():
    short, full = (
        summarize(collect_informative(Draws(*rewards), resample=1), [UPDATE], 1.0, 1.0)
        for rewards in ([(ALL, SPLIT), (NONE, ALL)], [(SPLIT, SPLIT)])
    )
    assert short_batches(Facts([full, full, short])) is None
    assert "In 2 of 3 steps too few groups had a signal even after 2 draws of prompts" in said_of([short, full, short])


def test_a_run_that_found_no_group_reports_it():
    empty, full = (
        summarize(collect_informative(Draws(*rewards), resample=1), [{**UPDATE, "updated": moved}], 1.0, 1.0)
        for rewards, moved in (([(ALL, ALL), (NONE, ALL)], 0.0), ([(SPLIT, SPLIT)], 1.0))
    )
    assert "In 2 of 3 steps too few groups had a signal even after 2 draws" in said_of([full, empty, empty])


def said_of(rows):
    finding = short_batches(Facts(rows))
    assert finding is not None
    return finding.what


# ---- prompts of further draws


def test_the_prompts_of_a_further_draw_are_others_and_the_same_every_time():
    own, *further = ([EveryPrompt(50, seed=3).draw(step, 4, n) for step in range(6)] for n in range(4))
    for orders in further:
        assert orders != own
    assert len({str(orders) for orders in further}) == 3
    assert further[1] == [EveryPrompt(50, seed=3).draw(step, 4, 2) for step in range(6)]
    assert further[1] != [EveryPrompt(50, seed=4).draw(step, 4, 2) for step in range(6)]


@pytest.mark.parametrize("draw", [0, 1, 2])
def test_every_order_goes_through_all_prompts_before_any_comes_again(draw):
    drawn = [i for step in range(14) for i in EveryPrompt(7, seed=1).draw(step, 3, draw)]
    assert all(sorted(drawn[k : k + 7]) == list(range(7)) for k in range(0, 42, 7))


def hard_to_split(prompt, completion, example):
    """Agrees on most prompts: one in three tells even first tokens from odd ones."""
    return float(completion.split()[0][-1] in "02468") if int(prompt) % 3 == 0 and completion else 0.0


ENV_SIZE = 12


def trained_rows(seed=1, reward=hard_to_split, resample=6, steps=2, **more):
    env = TextGenerationEnv([str(i + 1) for i in range(ENV_SIZE)], reward, max_tokens=2, tokenizer=Numbers())
    engine, rows, seen = make_tiny_engine(VOCABULARY), [], []
    train(
        engine,
        env,
        replace(recipe("grpo"), resample=resample, **more),
        schedule=Schedule(1e-3, steps),
        prompts_per_step=3,
        group_size=4,
        sampling=Sampling(2, seed=seed),
        on_step=lambda step, row, episodes: (rows.append(row), seen.append(episodes)),
    )
    return rows, seen


def tokens_of(episodes):
    return [(e.group, e.prompt, e.text) for e in episodes]


def test_the_loop_refills_and_reports_everything_it_sampled():
    rows, seen = trained_rows()
    assert max(row["prompt_draws"] for row in rows) > 1
    for row, episodes in zip(rows, seen, strict=True):
        assert len(episodes) == row["prompt_draws"] * 3 * 4
        assert [e.group for e in episodes] == [i // 4 for i in range(len(episodes))]
        assert row["reward_mean"] == pytest.approx(np.mean([e.reward for e in episodes]))
        assert row["frac_reward_zero_std"] == pytest.approx(frac_reward_zero_std(episodes))
        assert row["sampled_tokens"] == sum(e.mask.sum() for e in episodes)
        assert row["batch_full"] == (len({e.group for e in informative(episodes)}) >= 3)


def test_the_same_seed_draws_the_same_prompts_and_completions_however_many_draws_it_takes():
    (_, first), (_, again), (_, other) = trained_rows(), trained_rows(), trained_rows(seed=2)
    assert [tokens_of(s) for s in first] == [tokens_of(s) for s in again]
    assert [tokens_of(s) for s in first] != [tokens_of(s) for s in other]


def test_without_refilling_a_step_samples_the_same_completions():
    (_, refilled), (_, plain) = trained_rows(steps=1), trained_rows(steps=1, resample=0)
    assert tokens_of(refilled[0])[: len(plain[0])] == tokens_of(plain[0])


def test_a_further_draw_of_the_same_prompt_gives_other_completions():
    _, [sampled] = trained_rows(reward=lambda prompt, completion, example: 0.0, resample=7, steps=1)
    by_prompt = {}
    for e in sampled:
        by_prompt.setdefault(e.prompt, {}).setdefault(e.group, []).append(e.text)
    repeated = [list(groups.values()) for groups in by_prompt.values() if len(groups) > 1]
    assert repeated
    assert all(groups[0] != groups[1] for groups in repeated)


def test_a_reward_of_none_is_an_unscorable_completion_all_the_way_to_the_row():
    def sometimes(prompt, completion, example):
        return None if int(completion.split()[0]) % 3 == 0 else float(len(completion) % 2)

    env = TextGenerationEnv(["1", "2"], sometimes, max_tokens=2, tokenizer=Numbers())
    episodes = collect(make_tiny_engine(VOCABULARY), env, [0, 1], 8, Sampling(2, seed=3))
    lost = np.array([int(e.text.split()[0]) % 3 == 0 for e in episodes])
    assert lost.any()
    assert np.array_equal(np.isnan([e.reward for e in episodes]), lost)
    assert not recipe("grpo").credit(episodes).advantages[lost].any()
