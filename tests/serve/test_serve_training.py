"""The real SDK trains, saves, loads and samples through the server; the model is made of NumPy."""

import numpy as np
import pytest
from made_model import V, log_softmax

tinker = pytest.importorskip("tinker", reason="the clients are the Tinker SDK's")

from textpolicy.serving import Adapter  # noqa: E402

BASE = "made/pairs"


def datum(tokens, **inputs):
    arrays = {"target_tokens": np.array(tokens[1:]), "weights": np.ones(len(tokens) - 1, np.float32), **inputs}
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(list(tokens[:-1])), loss_fn_inputs=arrays)


def prompt(*tokens):
    return tinker.ModelInput.from_ints(list(tokens))


def trained(client, steps, data, rate=0.1):
    """The sums of the loss before each step."""
    losses = []
    for _ in range(steps):
        passed, stepped = client.forward_backward(data, "cross_entropy"), client.optim_step(adam(rate))
        losses.append(passed.result().metrics["loss:sum"])
        stepped.result()
    return losses


def adam(rate=0.1):
    return tinker.AdamParams(learning_rate=rate)


def test_steps_lower_the_loss_and_their_log_probs_are_those_of_the_model(connect, made):
    client = connect().create_lora_training_client(BASE, rank=4, seed=7).result()
    data = [datum([1, 2, 3, 4]), datum([5, 6])]
    passed = client.forward_backward(data, "cross_entropy").result()
    table = log_softmax(made.table + made.learner(Adapter(seed=7)).delta)
    for one, tokens in zip(passed.loss_fn_outputs, ([1, 2, 3, 4], [5, 6]), strict=True):
        np.testing.assert_allclose(one["logprobs"].to_numpy(), table[tokens[:-1], tokens[1:]], rtol=1e-5)
    expected = -sum(table[tokens[:-1], tokens[1:]].sum() for tokens in ([1, 2, 3, 4], [5, 6]))
    assert passed.metrics["loss:sum"] == pytest.approx(expected)
    client.optim_step(adam()).result()
    losses = trained(client, 4, data)
    assert losses == sorted(losses, reverse=True)
    assert losses[0] < expected


def test_a_pass_without_its_gradient_changes_nothing(connect):
    client = connect().create_lora_training_client(BASE, seed=1).result()
    first = client.forward([datum([1, 2])], "cross_entropy").result().metrics
    client.optim_step(adam()).result()
    assert client.forward([datum([1, 2])], "cross_entropy").result().metrics == first


def test_many_data_come_in_chunks_and_their_log_probs_go_back_in_order(connect):
    client = connect().create_lora_training_client(BASE, seed=1).result()
    tokens = np.random.default_rng(0).integers(1, V, (2500, 3))
    outputs = client.forward_backward([datum(row.tolist()) for row in tokens], "cross_entropy").result()
    assert len(outputs.loss_fn_outputs) == 2500
    alone = client.forward([datum(tokens[2400].tolist())], "cross_entropy").result().loss_fn_outputs[0]
    np.testing.assert_array_equal(outputs.loss_fn_outputs[2400]["logprobs"].to_numpy(), alone["logprobs"].to_numpy())


def test_a_loss_of_ones_own_is_differentiated_by_the_client(connect):
    torch = pytest.importorskip("torch", reason="forward_backward_custom differentiates in PyTorch")
    service, data = connect(), [datum([1, 2, 3]), datum([4, 5])]
    weights = [torch.tensor([0.5, 2.0]), torch.tensor([1.0])]

    def loss(_, logprobs):
        total = -sum((w * l).sum() for w, l in zip(weights, logprobs, strict=True))
        return total, {"mine": float(total.detach())}

    custom, built_in = (service.create_lora_training_client(BASE, seed=1).result() for _ in range(2))
    mine = custom.forward_backward_custom(data, loss).result()
    weighted = [datum(tokens, weights=w.numpy()) for tokens, w in zip(([1, 2, 3], [4, 5]), weights, strict=True)]
    theirs = built_in.forward_backward(weighted, "cross_entropy").result()
    assert mine.metrics["mine"] == pytest.approx(theirs.metrics["loss:sum"], rel=1e-5)
    after = []
    for client in (custom, built_in):
        client.optim_step(adam()).result()
        after.append(client.forward(data, "cross_entropy").result().metrics["loss:sum"])
    assert after[0] == pytest.approx(after[1], rel=1e-5)
    assert after[0] < theirs.metrics["loss:sum"]


def test_stable_reinforce_is_refused_with_the_loss_to_pass_instead(connect):
    client = connect().create_lora_training_client(BASE, seed=1).result()
    sampled = {"logprobs": np.zeros(2, np.float32), "advantages": np.ones(2, np.float32)}
    data = [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints([1, 2]),
            loss_fn_inputs={"target_tokens": np.array([2, 3]), **sampled},
        )
    ]
    with pytest.raises(tinker.RequestFailedError, match="pass loss_fn='importance_sampling'"):
        client.forward_backward(data, "stable_reinforce").result()
    assert client.forward_backward(data, "importance_sampling").result().metrics["loss:sum"] < 0


def test_a_saved_model_goes_on_as_if_nothing_had_been(connect):
    service = connect()
    client = service.create_lora_training_client(BASE, seed=3).result()
    data = [datum([1, 2, 3])]
    trained(client, 2, data)
    path = client.save_state("two").result().path
    expected = trained(client, 3, data)
    again = service.create_training_client_from_state_with_optimizer(path).result()
    assert trained(again, 3, data) == expected
    fresh = service.create_training_client_from_state(path).result()
    first, *rest = trained(fresh, 3, data)
    assert first == expected[0]
    assert rest != expected[1:]  # a fresh optimiser takes other steps
    with pytest.warns(FutureWarning, match="load_state"):
        client.load_state_with_optimizer(path).result()
    assert trained(client, 3, data) == expected


def test_samplers_stay_as_they_were_when_they_were_taken(connect, made):
    service = connect()
    client = service.create_lora_training_client(BASE, seed=3).result()
    ask = tinker.SamplingParams(max_tokens=8, seed=5)
    early = client.save_weights_and_get_sampling_client().result()
    path = client.save_weights_for_sampler("named").result().path
    before = early.sample(prompt(1), 4, ask).result()
    trained(client, 5, [datum([1, 9, 1, 9])], rate=1.0)
    late = client.save_weights_and_get_sampling_client().result()
    for sampler in (early, service.create_sampling_client(model_path=path).result()):
        after = sampler.sample(prompt(1), 4, ask).result()
        assert [s.tokens for s in after.sequences] == [s.tokens for s in before.sequences]
    [taught] = late.sample(prompt(1), 1, tinker.SamplingParams(max_tokens=1, temperature=0)).result().sequences
    assert taught.tokens == [9]
    base = service.create_sampling_client(base_model=BASE).result()
    table = log_softmax(made.table)
    found = base.compute_logprobs(prompt(1, 2, 3)).result()
    assert found[0] is None
    assert found[1:] == pytest.approx([table[1, 2], table[2, 3]], rel=1e-5)


def test_completions_have_log_probs_alternatives_and_what_was_read_of_the_prompt(connect, made):
    sampler = connect().create_sampling_client(base_model=BASE).result()
    table = log_softmax(made.table)
    found = sampler.sample(
        prompt(1, 2, 3), 3, tinker.SamplingParams(max_tokens=6, seed=1, stop=[]),
        include_prompt_logprobs=True, topk_prompt_logprobs=2, topk_sample_logprobs=3, prompt_alt_tokens_k=5,
    ).result()  # fmt: skip
    assert len({s.sequence_id for s in found.sequences}) == 3
    for sequence in found.sequences:
        assert len(sequence.tokens) == 6
        assert sequence.stop_reason == "length"
        steps = table[[3, *sequence.tokens[:-1]], sequence.tokens]
        np.testing.assert_allclose(sequence.logprobs, steps, rtol=1e-5)
        assert [t for t, _ in sequence.topk_logprobs[0]] == np.argsort(-table[3])[:3].tolist()
    assert found.topk_prompt_logprobs[0] is None or found.topk_prompt_logprobs[0] == []
    assert [t for t, _ in found.topk_prompt_logprobs[1]] == np.argsort(-table[1])[:2].tolist()
    drawn = found.prompt_alt_tokens
    assert drawn.tokens.shape == drawn.logprobs.shape == [2, 5]
    ids = drawn.tokens.to_numpy()
    np.testing.assert_allclose(drawn.logprobs.to_numpy(), np.take_along_axis(table[1:3], ids, 1), rtol=1e-5)


@pytest.mark.parametrize(("stop", "ends"), [("b", 2), (["ab", "b"], 2), ([2], 2), (None, 0)])
def test_a_completion_ends_where_it_was_told_to(connect, made, stop, ends):
    made.table[:] = -50.0
    made.table[1, 2] = made.table[2, 0] = made.table[0, 5] = made.table[5, 2] = 0.0  # a, b, end, e, b
    sampler = connect().create_sampling_client(base_model=BASE).result()
    [s] = sampler.sample(prompt(1), 1, tinker.SamplingParams(max_tokens=9, stop=stop)).result().sequences
    assert s.stop_reason == "stop"
    assert s.tokens[-1] == ends
    [s] = sampler.sample(prompt(1), 1, tinker.SamplingParams(max_tokens=9, stop=[])).result().sequences
    assert s.stop_reason == "length"


def test_samplers_in_flight_follow_their_model(connect):
    client = connect().create_lora_training_client(BASE, seed=3).result()
    ask = tinker.SamplingParams(max_tokens=1, temperature=0)
    flying = client.save_weights_and_get_sampling_client(kind="inflight").result()
    trained(client, 5, [datum([1, 9, 1, 9])], rate=1.0)
    client.save_weights_and_get_sampling_client(kind="inflight").result()
    assert flying.sample(prompt(1), 1, ask).result().sequences[0].tokens == [9]
