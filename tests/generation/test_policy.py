"""create_policy, generate_tokens, encode and decode."""

from types import SimpleNamespace

import numpy as np
import pytest

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx
from conftest import tiny_llama

from textpolicy.environment import TextGenerationEnv
from textpolicy.errors import UserError
from textpolicy.generation.mlx_generation import create_policy, decode, decode_token_ids, encode, generate_tokens
from textpolicy.rollout import BatchedPolicy, RolloutRunner, create_strategy

VOCABULARY, STOP = 48, 3
SPECIAL = {STOP}


class TinyTokenizer:
    """Tokens are letters from '0' on; number 3 ends a completion and is never shown."""

    eos_token_ids = SPECIAL

    def __init__(self):
        self.encoded = []

    def encode(self, text):
        self.encoded.append(text)
        return [ord(c) - ord("0") for c in text]

    def decode(self, ids, skip_special_tokens=False):
        return "".join(" " if i == 0 else chr(i + ord("0")) for i in ids if not (skip_special_tokens and i in SPECIAL))


@pytest.fixture(scope="module")
def model():
    return tiny_llama(VOCABULARY, seed=1)


@pytest.fixture
def tokenizer():
    return TinyTokenizer()


PROMPT = mx.array([5, 9, 7], mx.int32)


def logprobs_by_hand(model, prompt, completion, temperature=1.0):
    """Teacher forcing, one pass without any cache: the log-prob of each completion token."""
    tokens = [*np.asarray(prompt).tolist(), *np.asarray(completion).tolist()]
    logits = np.asarray(model(mx.array([tokens])))[0].astype(np.float64) / temperature
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    first = len(tokens) - len(completion)
    return np.array([logits[i - 1, tokens[i]] for i in range(first, len(tokens))])


# what a call returns


def test_a_policy_satisfies_the_protocol_of_rollouts(model, tokenizer):
    assert isinstance(create_policy(model, tokenizer), BatchedPolicy)


def test_a_completion_is_int32_ids_with_float32_logprob_and_entropy(model, tokenizer):
    ids, extras = create_policy(model, tokenizer, {"max_tokens": 6})(PROMPT)
    assert ids.dtype == mx.int32
    assert 1 <= ids.size <= 6
    assert set(extras) == {"logprob", "entropy", "temperature", "truncated"}
    for name in ("logprob", "entropy"):
        assert extras[name].dtype == mx.float32
        assert extras[name].shape == ids.shape


@pytest.mark.parametrize("temperature", [1.0, 1.7, 0.4])
def test_logprobs_are_of_the_distribution_sampled_whatever_the_temperature(model, tokenizer, temperature):
    ids, extras = create_policy(model, tokenizer, {"max_tokens": 8, "temperature": temperature})(PROMPT)
    assert extras["temperature"] == temperature
    assert np.allclose(extras["logprob"], logprobs_by_hand(model, PROMPT, ids, temperature), atol=1e-4)


def test_a_high_temperature_is_not_capped(model, tokenizer):
    """Near-uniform sampling uses far more of the vocabulary than sampling at 0.7 could."""
    policy = create_policy(model, tokenizer, {"max_tokens": 50, "temperature": 1000.0})
    drawn = {int(t) for ids, _ in policy.sample_batch([PROMPT] * 20) for t in np.asarray(ids)}
    assert len(drawn) == VOCABULARY


def test_the_stop_token_is_kept_and_ends_the_completion(model, tokenizer):
    policy = create_policy(model, tokenizer, {"max_tokens": 50, "temperature": 1000.0})
    stopped = [np.asarray(ids) for ids, _ in policy.sample_batch([PROMPT] * 20) if ids.size < 50]
    assert stopped
    assert all(ids[-1] == STOP and STOP not in ids[:-1] for ids in stopped)


@pytest.mark.parametrize("changes", [{"top_p": 0.9}, {"repetition_penalty": 1.1}])
def test_a_truncated_or_penalised_distribution_has_no_temperature_to_train_at(model, tokenizer, changes):
    env = TextGenerationEnv(["59"], lambda prompt, completion, example: 1.0, tokenizer=tokenizer)
    policy = create_policy(model, tokenizer, {"max_tokens": 4, **changes})
    assert policy(PROMPT)[1]["temperature"] is None
    buffer = RolloutRunner(env, policy, create_strategy("grpo"), max_steps=1).collect()
    assert buffer.episodes[0].as_training().temperature is None


# seeds


def test_successive_calls_draw_differently_and_two_policies_of_a_seed_agree(model, tokenizer):
    def three(seed):
        policy = create_policy(model, tokenizer, {"max_tokens": 12, "seed": seed})
        return [np.asarray(policy(PROMPT)[0]).tolist() for _ in range(3)]

    first = three(7)
    assert len({tuple(ids) for ids in first}) == 3
    assert three(7) == first
    assert three(8) != first


def test_completions_of_equal_prompts_in_one_call_differ(model, tokenizer):
    outputs = create_policy(model, tokenizer, {"max_tokens": 12}).sample_batch([PROMPT] * 3)
    assert len({tuple(np.asarray(ids).tolist()) for ids, _ in outputs}) == 3


def test_a_deterministic_call_is_greedy_and_leaves_the_draws_as_they_were(model, tokenizer):
    interrupted, plain = (create_policy(model, tokenizer, {"max_tokens": 5}) for _ in range(2))
    greedy, extras = interrupted(PROMPT, deterministic=True)
    assert extras["temperature"] == 0
    tokens = np.asarray(PROMPT).tolist()
    for token in np.asarray(greedy).tolist():
        assert token == int(mx.argmax(model(mx.array([tokens]))[0, -1]))
        tokens.append(token)
    assert interrupted(PROMPT)[0].tolist() == plain(PROMPT)[0].tolist()


# batches


def test_a_batch_of_mixed_lengths_gives_each_prompt_its_own_exact_logprobs(model, tokenizer):
    prompts = [[5], [5, 9, 7, 1, 2, 8], [9, 9, 9], [5, 9, 7]]
    outputs = create_policy(model, tokenizer, {"max_tokens": 7}).sample_batch([np.array(p) for p in prompts])
    assert len(outputs) == 4
    for prompt, (ids, extras) in zip(prompts, outputs, strict=True):
        assert np.allclose(extras["logprob"], logprobs_by_hand(model, prompt, ids), atol=1e-4)


def test_a_runner_collects_in_one_call_and_nothing_is_tokenised_again(model, tokenizer):
    env = TextGenerationEnv(
        ["59", "7"],
        lambda prompt, completion, example: len(completion),
        max_tokens=4,
        tokenizer=tokenizer,
        group_size=2,
    )
    once = list(tokenizer.encoded)
    policy = create_policy(model, tokenizer, {"max_tokens": 4})
    buffer = RolloutRunner(env, policy, create_strategy("grpo"), max_steps=4).collect()
    assert tokenizer.encoded == once == ["59", "7"]
    assert [e.group for e in buffer.episodes] == [0, 0, 1, 1]
    for episode in buffer.episodes:
        got = logprobs_by_hand(model, episode.obs[0], episode.act[0])
        assert np.allclose(episode.logprob[0], got, atol=1e-4)


# what cannot work


def test_an_unknown_key_is_an_error_that_names_the_near_match(model, tokenizer):
    with pytest.raises(UserError, match="'temprature'; did you mean 'temperature'"):
        create_policy(model, tokenizer, {"temprature": 0.5})


def test_text_instead_of_token_ids_is_refused(model, tokenizer):
    with pytest.raises(UserError, match=r"encode text first"):
        create_policy(model, tokenizer)("a prompt")


def test_an_empty_prompt_is_refused(model, tokenizer):
    with pytest.raises(UserError, match="a prompt is empty"):
        create_policy(model, tokenizer)(mx.array([], mx.int32))


# the functions


def test_generate_tokens_takes_the_documented_arguments_and_has_one_extra(model, tokenizer):
    ids, extras = generate_tokens(model, tokenizer, PROMPT, 6, 0.7, 0.9, 1.1)
    assert ids.size <= 6
    assert set(extras) == {"logprob"}
    assert extras["logprob"].shape == ids.shape


def test_generate_tokens_draws_anew_each_time_unless_mlx_is_seeded(model, tokenizer):
    def draw():
        return generate_tokens(model, tokenizer, PROMPT, 12, 1.0, 1.0, 1.0)[0].tolist()

    mx.random.seed(5)
    first, second = draw(), draw()
    mx.random.seed(5)
    assert [draw(), draw()] == [first, second]
    assert first != second


def test_generate_tokens_does_not_cap_the_temperature(model, tokenizer):
    ids, extras = generate_tokens(model, tokenizer, PROMPT, 8, 2.5, 1.0, 1.0)
    assert np.allclose(extras["logprob"], logprobs_by_hand(model, PROMPT, ids, 2.5), atol=1e-4)


def test_encode_gives_int32_and_decode_gives_the_text_back(tokenizer):
    ids = encode(tokenizer, "597")
    assert ids.dtype == mx.int32
    assert ids.tolist() == [5, 9, 7]
    assert decode(tokenizer, ids) == "597"
    assert encode(tokenizer, "").shape == (0,)
    assert decode(tokenizer, encode(tokenizer, "")) == ""


def test_decoding_skips_special_tokens_and_trims(tokenizer):
    assert decode(tokenizer, mx.array([0, 5, 0, 9, 0, STOP])) == "5 9"
    assert decode_token_ids(tokenizer, [0, 5, 0, 9, 0, STOP]) == "5 9"


def test_a_policy_uses_only_the_stop_tokens_of_its_tokenizer(model, tokenizer):
    stops_only = SimpleNamespace(eos_token_ids={STOP})
    settings = {"max_tokens": 20, "temperature": 1000.0, "seed": 2}
    ours, whole = (create_policy(model, t, settings).sample_batch([PROMPT] * 20) for t in (stops_only, tokenizer))
    assert [ids.tolist() for ids, _ in ours] == [ids.tolist() for ids, _ in whole]
    assert any(ids[-1].item() == STOP for ids, _ in ours)
