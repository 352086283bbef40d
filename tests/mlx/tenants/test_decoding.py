"""The continuous batch: what a request gets does not depend on what else is decoded."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from families import adapted
from tiny import arrays, log_softmax, tenant, tiny_base
from toy_tokenizers import Letters

from textpolicy.config.adapters import LoRA
from textpolicy.engine import Sampling
from textpolicy.errors import NotFiniteError, UserError
from textpolicy.mlx.engine import MLXEngine
from textpolicy.mlx.tenants import decoding as module
from textpolicy.mlx.tenants.mixed import can_mix
from textpolicy.serving import Request


def decoded(base, requests, apart=0):
    """The results of ``requests`` that join ``apart`` tokens one after the other."""
    batch, out = base.decoding(), {}
    for key, request in requests.items():
        batch.admit(key, request)
        for _ in range(apart):
            out |= batch.step()
    while len(batch):
        out |= batch.step()
    return out


def three(base):
    """Requests of two adapters and the base, alike in nothing."""
    a, b = (tenant(base, seed).weights() for seed in (1, 2))
    return {
        "a": Request(a, np.array([5, 6, 7]), 3, Sampling(12, seed=1), frozenset([0])),
        "b": Request(b, np.array([5, 6, 7, 8, 9]), 2, Sampling(9, temperature=0.7, seed=2), frozenset([0]), top=3),
        "c": Request(base.base, np.array([5]), 2, Sampling(5, top_k=5, seed=2), frozenset(range(0, 300, 2))),
        "d": Request(a, np.array([5, 6, 7]), 1, Sampling(4, temperature=0.0), frozenset()),
    }


@pytest.mark.parametrize(("apart", "at_once"), [(0, 8), (1, 1), (3, 1), (1, 3)])
def test_completions_are_the_same_alone_and_beside_those_of_other_samplers(apart, at_once, monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    base = tiny_base()
    requests = three(base)
    together = decoded(base, requests, apart)
    for key, request in requests.items():
        alone = decoded(base, {key: request})[key]
        assert len(alone) == len(together[key]) == request.n
        for x, y in zip(alone, together[key], strict=True):
            assert x.completion.tokens.tolist() == y.completion.tokens.tolist()
            assert x.completion.truncated == y.completion.truncated
            np.testing.assert_allclose(x.completion.logprobs, y.completion.logprobs, atol=1e-4)


def test_few_places_change_nothing(monkeypatch):
    base = tiny_base()
    requests = three(base)
    wide = decoded(base, requests)
    monkeypatch.setattr(module, "PLACES", 2)
    for key, some in decoded(base, requests).items():
        for x, y in zip(wide[key], some, strict=True):
            assert x.completion.tokens.tolist() == y.completion.tokens.tolist()


def test_sampled_log_probs_are_those_of_a_forward_pass_at_their_temperature():
    base = tiny_base()
    requests = three(base)
    for key, some in decoded(base, requests).items():
        request = requests[key]
        for i, s in enumerate(some):
            c = s.completion
            whole = np.concatenate([request.prompt, c.tokens])
            exact = np.array(log_softmax(request.weights.model, whole[:-1]), np.float64)[len(request.prompt) - 1 :]
            exact = exact / (request.sampling.temperature or 1.0)
            exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
            if request.sampling.top_k:
                kept = np.argsort(-exact, axis=1)[:, : request.sampling.top_k]
                mass = np.log(np.take_along_axis(np.exp(exact), kept, 1).sum(axis=1, keepdims=True))
                assert all(token in line for token, line in zip(c.tokens, kept, strict=True))
                exact -= mass
            np.testing.assert_allclose(c.logprobs, exact[np.arange(len(c.tokens)), c.tokens], atol=1e-4, err_msg=f"{i}")
            if request.top:
                assert s.alternatives.tokens.shape == (len(c.tokens), request.top)
                order = np.argsort(-exact, axis=1)[:, : request.top]
                assert np.array_equal(s.alternatives.tokens, order)
                np.testing.assert_allclose(s.alternatives.logprobs, np.take_along_axis(exact, order, 1), atol=1e-4)


def test_one_sampler_alone_samples_what_our_engine_does():
    base = tiny_base()
    weights = tenant(base, 3).weights()
    engine = MLXEngine(weights.model, stop=[0])
    [expected] = engine.sample([[5, 6, 7]], 6, Sampling(10, seed=4))
    request = Request(weights, np.array([5, 6, 7]), 6, Sampling(10, seed=4), frozenset([0]))
    for theirs, ours in zip(expected, decoded(base, {"a": request})["a"], strict=True):
        assert theirs.tokens.tolist() == ours.completion.tokens.tolist()
        np.testing.assert_allclose(theirs.logprobs, ours.completion.logprobs, atol=1e-4)
        np.testing.assert_allclose(theirs.entropy, ours.completion.entropy, atol=1e-4)
        assert theirs.truncated == ours.completion.truncated


def test_a_cancelled_request_leaves_and_the_others_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", 1)
    base = tiny_base()
    requests = three(base)
    whole = decoded(base, requests)
    batch, out = base.decoding(), {}
    for key, request in requests.items():
        batch.admit(key, request)
    batch.step()
    batch.cancel("a")
    batch.admit("a", requests["a"])
    batch.cancel("a")
    assert len(batch) == 3
    while len(batch):
        out |= batch.step()
    assert out.keys() == {"b", "c", "d"}
    for key, some in out.items():
        assert [s.completion.tokens.tolist() for s in some] == [s.completion.tokens.tolist() for s in whole[key]]
    assert batch.step() == {}


@pytest.mark.parametrize(("part", "value"), [("lora_a", np.nan), ("lora_b", np.inf), ("lora_a", 1e38)])
def test_logits_that_are_not_finite_fail_the_requests_of_their_sampler_alone(part, value):
    base = tiny_base()
    bad = tenant(base, 1)
    names = [name for name in arrays(bad) if name.endswith(part)]
    bad.model.load_weights([(name, mx.full(arrays(bad)[name].shape, value)) for name in names], strict=False)
    requests = three(base)
    for key in ("a", "d"):
        requests[key] = replace(requests[key], weights=bad.weights())
    found = decoded(base, requests)
    assert found.keys() == requests.keys()
    for key in ("a", "d"):
        assert isinstance(found[key], NotFiniteError)
    for key in ("b", "c"):
        alone = decoded(base, {key: requests[key]})[key]
        assert [s.completion.tokens.tolist() for s in found[key]] == [s.completion.tokens.tolist() for s in alone]
    assert len(base.decoding()) == 0


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_moe", "dbrx", "mamba", "gpt2"])
def test_other_families_decode_adapters_beside_each_other(family):
    model = adapted(family, LoRA(rank=4))
    from textpolicy.mlx.adapters.attach import detach
    from textpolicy.mlx.tenants.shared import twin
    from textpolicy.mlx.tenants.snapshot import Snapshot

    bare = twin(model)
    detach(bare)
    base = tiny_base(bare, context=None)
    weights = Snapshot(model)
    assert can_mix(model) == (family not in ("qwen3_moe", "dbrx"))
    stop = frozenset()
    requests = {
        "a": Request(weights, np.array([5, 6, 7, 8]), 2, Sampling(5, seed=1), stop),
        "b": Request(base.base, np.array([5, 6, 9, 1, 2]), 2, Sampling(5, seed=2), stop),
    }
    together = decoded(base, requests)
    for key, request in requests.items():
        [tokens] = [[s.completion.tokens.tolist() for s in decoded(base, {key: request})[key]]]
        assert [s.completion.tokens.tolist() for s in together[key]] == tokens


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"prompt": np.zeros(0, int)}, "0 tokens"),
        ({"prompt": np.array([300])}, "300"),
        ({"n": 0}, "0 completions"),
        ({"sampling": Sampling(300)}, "256"),
        ({"sampling": Sampling(3, repetition_penalty=1.2)}, "repetition penalty"),
    ],
)
def test_requests_that_can_never_be_served_are_refused(request_, said):
    base = tiny_base()
    given = {"weights": base.base, "prompt": np.array([5]), "n": 1, "sampling": Sampling(3), "stop": frozenset()}
    with pytest.raises(UserError, match=said):
        base.decoding().admit("a", Request(**{**given, **request_}))
    assert len(base.decoding()) == 0


def test_a_text_ends_a_completion_at_the_token_that_completes_it():
    base = tiny_base()
    base.decoding()._tokenizer = Letters()
    free = Request(base.base, np.array([5]), 4, Sampling(40, seed=5), frozenset())
    texts = [[Letters().decode([t]) for t in s.completion.tokens] for s in decoded(base, {"a": free})["a"]]
    wanted = "".join(texts[0][10:13])
    ended = Request(
        base.base, np.array([5]), 4, Sampling(40, seed=5), frozenset(), strings=(wanted, "never to be seen")
    )
    for pieces, s in zip(texts, decoded(base, {"a": ended})["a"], strict=True):
        stops = [n for n in range(1, 41) if wanted in "".join(pieces[:n])]
        assert len(s.completion.tokens) == min([*stops, 40])
        assert s.completion.truncated == (not stops)
