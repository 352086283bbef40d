"""The teacher of a distillation: what it reads, how far it leads, and exactly 0 where it is the policy."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from chat_tokenizers import chat_tokenizer
from conftest import make_tiny_engine, recipe, tiny_llama
from toy_tokenizers import Letters

from textpolicy.algorithms.distillation import Distillation
from textpolicy.engine import Sampling
from textpolicy.environment import TextGenerationEnv
from textpolicy.errors import UserError
from textpolicy.loop.collect import collect
from textpolicy.loop.teacher import Teacher, refuse_other_tokens, teacher_kl, with_prompt
from textpolicy.loop.train import Schedule, train
from textpolicy.mlx.engine import MLXEngine
from textpolicy.types import Batch


@pytest.fixture(scope="module")
def engine():
    """A policy over letters, which moves away from its base."""
    return make_tiny_engine(128)


@pytest.fixture
def env():
    examples = [{"answer": "six"}, {"answer": 7}]
    return TextGenerationEnv(["ab", "cde"], lambda **_: 0.0, 5, tokenizer=Letters(), examples=examples)


@pytest.fixture
def episodes(engine, env):
    return collect(engine, env, [0, 1], 3, Sampling(5, seed=4))


def scored(engine, episodes, reference=False):
    batch = Batch.pack(episodes, [np.zeros(len(e.tokens), np.float32) for e in episodes])
    return engine.score(batch, reference=reference)[batch.weights != 0]


def leads(episodes):
    return np.concatenate([e.lead[e.mask] for e in episodes])


def test_a_teacher_that_is_the_policy_leads_by_exactly_0(engine, env, episodes):
    assert not leads(Teacher().teach(engine, env, episodes)).any()
    fresh = make_tiny_engine(128)
    for module in fresh.model.modules():
        if "lora_b" in module:
            module.lora_b = mx.zeros_like(module.lora_b)
    assert not leads(Teacher(reference=True).teach(fresh, env, collect(fresh, env, [0, 1], 3, Sampling(5)))).any()


def test_the_base_leads_by_its_logprobs_minus_the_policys(engine, env, episodes):
    taught = Teacher(reference=True).teach(engine, env, episodes)
    expected = scored(engine, episodes, reference=True) - scored(engine, episodes)
    assert leads(taught) == pytest.approx(expected)
    assert teacher_kl(taught) == pytest.approx(-expected.mean(), abs=1e-6)
    assert np.abs(expected).max() > 0.01
    by_sampler = Teacher(reference=True, by_sampler=True).teach(engine, env, episodes)
    assert leads(by_sampler) == pytest.approx(expected, abs=1e-4)


def test_another_model_scores_the_same_tokens(engine, env, episodes):
    other = MLXEngine(tiny_llama(128, seed=9), stop=[0])
    taught = Teacher(other).teach(engine, env, episodes)
    assert leads(taught) == pytest.approx(scored(other, episodes) - scored(engine, episodes))


def test_privileged_context_is_read_behind_the_question_and_only_by_the_teacher(engine, env, episodes):
    taught = Teacher(context="answer").teach(engine, env, episodes)
    told = [
        with_prompt(e, Letters().encode(f"{asked}\n\nThe answer is: {answer}"))
        for e, (asked, answer) in zip(episodes, 3 * [("ab", "six")] + 3 * [("cde", "7")], strict=True)
    ]
    assert leads(taught) == pytest.approx(scored(engine, told) - scored(engine, episodes))
    assert [e.tokens.tolist() for e in taught] == [e.tokens.tolist() for e in episodes]
    with pytest.raises(UserError, match="read the demonstration and problem 0 has none"):
        Teacher(context="demonstration").teach(engine, env, episodes)


def test_a_sibling_that_is_right_is_another_of_the_group(engine, env, episodes):
    judged = [replace(e, is_correct=n in (0, 1)) for n, e in enumerate(episodes)]
    taught = Teacher(context="sibling").teach(engine, env, judged)
    assert not leads(taught[3:]).any()  # the group of none right
    read = [env.told(0, f"A response to this that was correct:\n{judged[n].text}") for n in (1, 0, 0)]
    told = [with_prompt(e, prompt) for e, prompt in zip(judged[:3], read, strict=True)]
    assert leads(taught[:3]) == pytest.approx(scored(engine, told) - scored(engine, judged[:3]), abs=1e-5)


def test_a_chat_template_writes_the_context_into_the_users_message():
    tokenizer = chat_tokenizer("chatml")
    env = TextGenerationEnv([[{"role": "user", "content": "the user"}]], lambda **_: 0.0, tokenizer=tokenizer)
    text = tokenizer.decode(env.told(0, "an answer"))
    assert text == "<|im_start|>user\nthe user\n\nan answer<|im_end|>\n<|im_start|>assistant\n"


def test_another_tokenizer_is_refused_by_a_probe():
    refuse_other_tokens(Letters(), Letters(), "x")
    with pytest.raises(UserError, match=r"the teacher x has another tokenizer .*they differ on 'The quick"):
        refuse_other_tokens(chat_tokenizer("chatml"), Letters(), "x")


def test_distilling_brings_the_policy_nearer_to_its_teacher(env):
    policy, other, rows = make_tiny_engine(128), MLXEngine(tiny_llama(128, seed=9), stop=[0]), []
    train(
        policy, env, replace(recipe("bnpo"), distillation=Distillation()), schedule=Schedule(0.05, 12),
        prompts_per_step=2, group_size=48, sampling=Sampling(5), teacher=Teacher(other),
        on_step=lambda step, row, episodes: rows.append(row),
    )  # fmt: skip
    kl = [row["teacher_kl"] for row in rows]
    assert np.mean(kl[-3:]) < np.mean(kl[:3]) - 0.1
    assert all(row["updated"] and row["frac_reward_zero_std"] == 1 for row in rows)  # where rewards say nothing


@pytest.mark.parametrize("context", ["none", "answer"])
def test_whole_distributions_bring_the_policy_nearer_to_its_teacher(env, context):
    policy, other, rows = make_tiny_engine(128), MLXEngine(tiny_llama(128, seed=9), stop=[0]), []
    train(
        policy, env, recipe("bnpo"), schedule=Schedule(0.03, 8),
        prompts_per_step=2, group_size=8, sampling=Sampling(5), teacher=Teacher(other, context=context, beta=0.9),
        on_step=lambda step, row, episodes: rows.append(row),
    )  # fmt: skip
    loss = [row["loss"] for row in rows]
    assert np.mean(loss[-2:]) < 0.8 * np.mean(loss[:2])
