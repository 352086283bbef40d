"""What the engine asks a server for, in which order, and what it makes of the answers; its clients only listen."""

from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import recipe
from fixed_episodes import fixed_episodes

from textpolicy.engine import Sampling
from textpolicy.errors import ServiceError, UserError
from textpolicy.losses import CrossEntropy, ImportanceSampling, Surrogate
from textpolicy.tinker.engine import Adam, TinkerEngine
from textpolicy.types import Batch

types = pytest.importorskip("tinker", reason="no Tinker SDK here: pip install 'textpolicy[tinker]'").types

EOS = 257


@dataclass
class Listening:
    """Service, training client and sampling client in one: logs requests and waits."""

    log: list = field(default_factory=list)
    sent: list = field(default_factory=list)
    answer: tuple = ([65, EOS], [-1.0, -2.0], "stop")
    optimizer_says: dict = field(default_factory=lambda: {"skyrl.ai/grad_norm": 0.5})

    @property
    def client(self):
        return self

    def telling(self, doing):
        return nullcontext()

    def call(self, doing, method, *args, **settings):
        return self.wait(method(*args, **settings), doing)

    def wait(self, pending, doing):
        name, result = pending
        self.log.append(f"wait {name}")
        return result

    def get_tokenizer(self):
        return SimpleNamespace(eos_token_id=EOS)

    def save_weights_and_get_sampling_client(self):
        self.log.append("sampler")
        return "sampler", self

    def sample(self, prompt, n, params):
        self.log.append("sample")
        self.sent.append((prompt.to_ints(), n, params))
        tokens, logprobs, reason = self.answer
        sequence = SimpleNamespace(tokens_np=np.array(tokens), logprobs_np=logprobs, stop_reason=reason)
        return "sample", SimpleNamespace(sequences=[sequence] * n)

    def forward_backward(self, data, loss, config):
        self.log.append("forward_backward")
        self.sent.append((data, loss, config))
        found = [{"logprobs": types.TensorData.from_numpy(np.full(d.model_input.length, -5, np.float32))} for d in data]
        return "forward_backward", SimpleNamespace(loss_fn_outputs=found, metrics={})

    def optim_step(self, params):
        self.log.append("optim_step")
        self.sent.append(params)
        return "optim_step", SimpleNamespace(metrics=self.optimizer_says)


def listening(**settings):
    server = Listening()
    return server, TinkerEngine(server, server, "model", **settings)


def credited(**changes):
    return recipe("grpo").credit(fixed_episodes(**changes))


def test_all_prompts_are_sent_before_any_answer_is_awaited():
    server, engine = listening()
    engine.sample([[1], [2], [3]], 2, Sampling())
    assert server.log == ["sampler", "wait sampler", *["sample"] * 3, *["wait sample"] * 3]
    assert [ids for ids, _, _ in server.sent] == [[1], [2], [3]]


def test_pass_and_step_are_queued_before_either_is_awaited():
    server, engine = listening()
    engine.update(credited(), Surrogate(), 1e-3)
    assert server.log == ["forward_backward", "optim_step", "wait forward_backward", "wait optim_step"]


def test_a_sampler_is_taken_anew_after_every_update_and_only_then():
    server, engine = listening()
    for _ in range(2):
        engine.sample([[1]], 1, Sampling())
        engine.sample([[1]], 1, Sampling())
        engine.update(credited(), Surrogate(), 1e-3)
    assert server.log.count("sampler") == 2


def test_every_prompt_has_a_seed_of_its_own_and_the_stop_tokens_of_the_model():
    server, engine = listening()
    engine.sample([[1], [1]], 2, Sampling(max_tokens=9, temperature=0.5, top_p=0.9, top_k=7, seed=3))
    first, second = (params for _, _, params in server.sent)
    assert first.seed != second.seed
    assert (first.max_tokens, first.temperature, first.top_p, first.top_k, first.stop) == (9, 0.5, 0.9, 7, [EOS])


def test_a_completion_has_the_tokens_and_log_probs_that_the_server_returned():
    server, engine = listening()
    [[one]] = engine.sample([[1]], 1, Sampling())
    assert (one.tokens.tolist(), one.tokens.dtype, one.truncated, one.entropy) == ([65, EOS], np.int32, False, None)
    assert (one.logprobs.tolist(), one.logprobs.dtype) == ([-1, -2], np.float32)
    server.answer = ([65, 66], [-1.0, -2.0], "length")
    assert engine.sample([[1]], 1, Sampling())[0][0].truncated


@pytest.mark.parametrize("logprobs", [None, [-1.0], [-1.0, float("nan")]])
def test_log_probs_that_cannot_be_trained_on_are_an_error_of_the_server(logprobs):
    server, engine = listening()
    server.answer = ([65, 66], logprobs, "length")
    with pytest.raises(ServiceError, match="log-probs"):
        engine.sample([[1]], 1, Sampling())


@pytest.mark.parametrize(
    ("sampling", "temperature"),
    [
        (Sampling(), 1.0),
        (Sampling(temperature=0.7), 0.7),
        (Sampling(top_p=0.9), None),
        (Sampling(temperature=0.0), 0.0),
    ],
)
def test_a_completion_knows_the_temperature_it_was_sampled_at(sampling, temperature):
    assert listening()[1].sample([[1]], 1, sampling)[0][0].temperature == temperature


def test_untempered_completions_are_trained_on_at_temperature_1():
    completion = listening(untempered=True)[1].sample([[1]], 1, Sampling(temperature=0.7))[0][0]
    assert completion.temperature == 1


@pytest.mark.parametrize("setting", [{"min_p": 0.1}, {"repetition_penalty": 1.1}])
def test_sampling_settings_that_the_service_lacks_are_refused(setting):
    with pytest.raises(UserError, match=f"{next(iter(setting))} is .*, which the Tinker service does not support"):
        listening()[1].sample([[1]], 1, Sampling(**setting))


def test_an_empty_prompt_is_refused():
    with pytest.raises(UserError, match="a prompt has no tokens"):
        listening()[1].sample([[1], []], 1, Sampling())


# ---- updates


def test_a_datum_holds_the_arrays_of_the_wire_and_nothing_else():
    server, engine = listening()
    batch = credited()
    engine.update(batch, Surrogate(ImportanceSampling()), 1e-3)
    data, loss, config = server.sent[0]
    assert (loss, config, len(data)) == ("importance_sampling", None, len(batch))
    for datum in data:
        assert set(datum.loss_fn_inputs) == {"target_tokens", "logprobs", "advantages"}
        arrays = {name: tensor.to_numpy() for name, tensor in datum.loss_fn_inputs.items()}
        assert {name: str(a.dtype) for name, a in arrays.items()} == {
            "target_tokens": "int64",
            "logprobs": "float32",
            "advantages": "float32",
        }
        assert {a.shape for a in arrays.values()} == {(datum.model_input.length,)}


def test_a_datum_of_cross_entropy_has_weights_alone():
    server, engine = listening()
    batch = credited()
    engine.update(batch, Surrogate(CrossEntropy()), 1e-3)
    data, loss, _ = server.sent[0]
    assert loss == "cross_entropy"
    assert {name for datum in data for name in datum.loss_fn_inputs} == {"target_tokens", "weights"}
    sent = sum(float(datum.loss_fn_inputs["weights"].to_numpy().sum()) for datum in data)
    assert sent == pytest.approx(float((batch.advantages * batch.weights).sum()), abs=1e-6)


def test_advantages_carry_the_weights_and_a_mean_is_undone():
    batch = credited(answers=(6, 2, 5, 1))
    _, of_sum = listening()
    _, of_mean = listening(reduction="mean")
    for row, summed, averaged in zip(range(len(batch)), of_sum.data(batch), of_mean.data(batch), strict=True):
        n = len(summed.advantages)
        np.testing.assert_allclose(summed.advantages, (batch.advantages * batch.weights)[row, :n], rtol=1e-6)
        np.testing.assert_allclose(averaged.advantages / n / len(batch), summed.advantages, rtol=1e-6)


def test_the_optimiser_has_the_given_settings():
    server, engine = listening(adam=Adam(0.8, 0.9, 1e-6, 0.1, 2.0))
    engine.update(credited(), Surrogate(), 3e-4)
    output = server.sent[1]
    assert (output.learning_rate, output.beta1, output.beta2, output.eps) == (3e-4, 0.8, 0.9, 1e-6)
    assert (output.weight_decay, output.grad_clip_norm) == (0.1, 2.0)


def test_rows_without_a_signal_are_not_sent():
    server, engine = listening()
    episodes = fixed_episodes()
    advantages = [np.full(len(e.tokens), float(i == 3)) for i, e in enumerate(episodes)]
    engine.update(Batch.pack(episodes, advantages), Surrogate(), 1e-3)
    (datum,) = server.sent[0][0]
    assert datum.model_input.to_ints() == episodes[3].tokens[:-1].tolist()


def test_without_any_signal_nothing_is_sent():
    server, engine = listening()
    episodes = fixed_episodes()
    row = engine.update(Batch.pack(episodes, [np.zeros(len(e.tokens)) for e in episodes]), Surrogate(), 1e-3)
    assert (row["updated"], server.log) == (0, [])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_advantages_that_are_not_finite_are_never_sent(value):
    server, engine = listening()
    batch = credited()
    spoilt = replace(batch, advantages=np.where(batch.weights != 0, value, 0).astype(np.float32))
    with pytest.raises(UserError, match=r"advantages of a datum has shape .* or is not finite; fix the batch"):
        engine.update(spoilt, Surrogate(), 1e-3)
    assert server.log == []


def test_a_batch_without_sampled_tokens_is_scored_without_a_request():
    server, engine = listening()
    batch = credited()
    scored = engine.score(replace(batch, weights=np.zeros_like(batch.weights)))
    assert scored.shape == batch.targets.shape
    assert not scored.any()
    assert server.log == []


def test_a_tokenizer_without_an_end_of_sequence_needs_stop_tokens():
    class Endless(Listening):
        def get_tokenizer(self):
            return SimpleNamespace(eos_token_id=None)

    server = Endless()
    with pytest.raises(UserError, match="names no token that ends a completion; set its eos_token, or give"):
        TinkerEngine(server, server, "model")
    assert TinkerEngine(server, server, "model", stop=[9, 4]).stop.tolist() == [4, 9]


@pytest.mark.parametrize(
    ("prompt", "n", "sentence"),
    [
        ([5, -1], 1, "there is no token -1, since ids start at 0"),
        ([5, 2**31], 1, "there is no token 2147483648"),
        ([1.5], 1, "is not a flat array of token ids"),
        ([5], 0, "n is 0; set it to 1 or more"),
    ],
)
def test_what_no_model_can_read_is_not_sent(prompt, n, sentence):
    server, engine = listening()
    with pytest.raises(UserError, match=sentence):
        engine.sample([[4], prompt], n, Sampling(3))
    assert server.log == []


def test_metrics_are_those_of_the_local_engine():
    server, engine = listening()
    row = engine.update(credited(), Surrogate(), 1e-3)
    # sampled at -5 and scored at -5: the ratio is 1 everywhere, and the advantages of a group cancel
    assert row == pytest.approx(
        {
            "loss": 0,
            "grad_norm": 0.5,
            "updated": 1,
            "logprob_gap_max": 0,
            "logprob_gap_mean": 0,
            "sampler_kl": 0,
            "clip_fraction_low": 0,
            "clip_fraction_high": 0,
        },
        abs=1e-6,
    )
    server.optimizer_says = {}
    assert "grad_norm" not in engine.update(credited(), Surrogate(), 1e-3)


def test_a_ratio_per_sequence_needs_one_advantage_per_completion():
    _, engine = listening()
    episodes = fixed_episodes()
    uneven = Batch.pack(episodes, [np.arange(len(e.tokens), dtype=float) for e in episodes])
    with pytest.raises(UserError, match="advantages differ from token to token"):
        engine.update(uneven, Surrogate(ratio="sequence"), 1e-3)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(UserError, match="there is no reduction 'median'"):
        listening(reduction="median")


# ---- what is kept


def test_a_save_whose_answer_was_lost_is_kept_under_another_name():
    tinker, names = pytest.importorskip("tinker"), []

    class Taken(Listening):
        def save_state(self, name):
            names.append(name)
            return "save_state", SimpleNamespace(path=f"tinker://run/weights/{name}")

        def wait(self, pending, doing):
            if len(names) == 1:
                lost = tinker.ConflictError.__new__(tinker.ConflictError)
                raise ServiceError("saving the state failed (409)") from lost
            return super().wait(pending, doing)

    server = Taken()
    assert TinkerEngine(server, server, "model").save_state("step_2") == "tinker://run/weights/step_2-again-1"
    assert names == ["step_2", "step_2-again-1"]


def test_a_save_that_fails_otherwise_is_not_tried_again():
    names = []

    class Full(Listening):
        def save_state(self, name):
            names.append(name)
            return "save_state", None

        def wait(self, pending, doing):
            raise ServiceError("saving the state failed (507)") from OSError("no room")

    server = Full()
    with pytest.raises(ServiceError, match="507"):
        TinkerEngine(server, server, "model").save_state("step_2")
    assert names == ["step_2"]


@pytest.mark.parametrize("content", [None, "{", "{}", "[]"])
def test_a_checkpoint_without_a_path_on_the_server_is_refused(content, tmp_path):
    _, engine = listening()
    if content is not None:
        (tmp_path / "server.json").write_text(content)
    for read in (engine.read_state, engine.read_weights):
        with pytest.raises(UserError, match=r"server\.json (has no path of a state|is not .*JSON).*; remove"):
            read(tmp_path)


# ---- waiting


def test_a_server_that_has_gone_ends_the_wait_and_one_that_is_slow_does_not(monkeypatch):
    from textpolicy.tinker import service as module

    service = object.__new__(module.Service)
    service.url, service.patience, service._key = "http://127.0.0.1:9", 0.2, None
    with pytest.raises(ServiceError, match=r"sampling failed: .* has not answered for 0.2 s"):
        service.wait(SimpleNamespace(future=Future), "sampling")
    slow, evaluations = Future(), []
    monkeypatch.setattr(
        module,
        "answers",
        lambda url, seconds=5.0: evaluations.append(url) or (len(evaluations) > 3 and slow.set_result("done")) or True,
    )
    assert service.wait(SimpleNamespace(future=lambda: slow), "sampling") == "done"
