"""What a tenant computes, against loops over one sequence at a time and NumPy in float64."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import random_episodes, recipe
from families import tiny_family
from tiny import arrays, flat, made, picked, tenant, tiny_base

from textpolicy.errors import NotFiniteError, UserError
from textpolicy.losses import Clip, ClippedWeight, ImportanceSampling, Surrogate
from textpolicy.mlx.adapters.saving import read_adapter
from textpolicy.mlx.engine import MLXEngine, PolicyObjective
from textpolicy.mlx.models import load_adapter
from textpolicy.mlx.tenants.shared import twin
from textpolicy.serving import Adam, Adapter, Datum
from textpolicy.tinker.datum import datum_arrays


def losses_by_hand(loss, l, datum, low=None, high=None, beta=None):
    """The loss of one datum and its slope by each log-prob, in float64, from the formulas of the Tinker API."""
    inputs = {name: np.asarray(value, np.float64) for name, value in datum.inputs.items()}
    if loss == "cross_entropy":
        return -(inputs["weights"] * l).sum(), -inputs["weights"]
    b, a = inputs["logprobs"], inputs["advantages"]
    value, slope = 0.0, np.zeros_like(l)
    if loss == "gspo":
        mask = inputs.get("sequence_ratio_mask", (a != 0) | (b != 0)) != 0
        s = np.exp((l - b)[mask].mean()) if mask.any() else 1.0
    for t in range(len(l)):
        if loss == "dro":
            if a[t] != 0 or b[t] != 0:
                value += -(l[t] * a[t] - beta / 2 * (l[t] - b[t]) ** 2)
                slope[t] = -(a[t] - beta * (l[t] - b[t]))
            continue
        r = s if loss == "gspo" else np.exp(l[t] - b[t])
        c = r if low is None else min(max(r, low), high)
        if loss == "cispo":
            value, slope[t] = value - c * a[t] * l[t], -c * a[t]
        elif c * a[t] < r * a[t]:
            value -= c * a[t]
        else:
            value, slope[t] = value - r * a[t], -r * a[t]
    return value, slope


LOSSES = [
    ("cross_entropy", {}, {}),
    ("importance_sampling", {}, {}),
    ("ppo", {}, {"low": 0.8, "high": 1.2}),
    ("ppo", {"clip_low_threshold": 0.3, "clip_high_threshold": 3.0}, {"low": 0.3, "high": 3.0}),
    ("cispo", {}, {"low": 0.0, "high": 4.0}),
    ("cispo", {"clip_low_threshold": 0.5, "clip_high_threshold": 2.0}, {"low": 0.5, "high": 2.0}),
    ("dro", {"beta": 0.3}, {"beta": 0.3}),
    ("gspo", {}, {"low": 0.8, "high": 1.2}),
    ("gspo", {"clip_low_threshold": 0.1, "clip_high_threshold": 9.0}, {"low": 0.1, "high": 9.0}),
]


CLOSE = 1e-3 if mx.default_device() == mx.gpu else 2e-4  # a GPU adds in another order


def assert_close(ours, oracle, tolerance=CLOSE):
    assert ours.keys() == oracle.keys()
    for name, value in oracle.items():
        scale = np.abs(value).max() + 1e-9
        np.testing.assert_allclose(ours[name] / scale, value / scale, atol=tolerance, err_msg=name)


def data_of(loss, rng):
    """Data with a shared prompt, without one, with nothing to learn, and of several targets."""
    cross_entropy, prompt = loss == "cross_entropy", rng.integers(1, 300, 6)
    data = [made(rng, n, prompt, cross_entropy=cross_entropy) for n in (5, 3, 8)]
    data += [made(rng, n, cross_entropy=cross_entropy) for n in (1, 4)]
    silent = made(rng, 4, prompt, cross_entropy=cross_entropy)
    data.append(Datum(silent.tokens, {n: v if n == "target_tokens" else 0 * v for n, v in silent.inputs.items()}))
    if cross_entropy:
        data += [made(rng, 5, prompt, k, cross_entropy=True) for k in (1, 3)]
    if loss == "gspo":
        mask = np.ones(len(data[0].tokens)) * (np.arange(len(data[0].tokens)) % 2)
        data[0] = Datum(data[0].tokens, {**data[0].inputs, "sequence_ratio_mask": mask})
    return data


@pytest.mark.parametrize(("loss", "config", "bounds"), LOSSES, ids=str)
@pytest.mark.parametrize("budget", [8192, 12])
def test_losses_log_probs_and_gradients_are_those_of_the_formulas(loss, config, bounds, budget):
    learner = tenant(tiny_base())
    learner.micro_batch_tokens = budget
    data = data_of(loss, np.random.default_rng(1))
    exact = [np.array(picked(learner.model, d), np.float64) for d in data]
    by_hand = [losses_by_hand(loss, l, d, **bounds) for l, d in zip(exact, data, strict=True)]
    slopes = [mx.array(slope.astype(np.float32)) for _, slope in by_hand]

    def total(model):
        return sum((picked(model, d) * slope).sum() for d, slope in zip(data, slopes, strict=True))

    oracle = nn.value_and_grad(learner.model, total)(learner.model)[1]
    silent = learner.passed(data, loss, config, backward=False)
    assert learner.gradient is None
    passed = learner.passed(data, loss, config, backward=True)
    for ours in (silent, passed):
        assert ours.metrics["loss:sum"] == pytest.approx(sum(value for value, _ in by_hand), rel=1e-4)
        for found, l in zip(ours.logprobs, exact, strict=True):
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, l, atol=1e-4)
    assert_close(flat(learner.gradient), flat(oracle))


@pytest.mark.parametrize(
    ("loss", "config", "surrogate"),
    [
        ("importance_sampling", {}, Surrogate(ImportanceSampling())),
        ("ppo", {}, Surrogate(Clip(0.2, 0.2))),
        ("cispo", {}, Surrogate(ClippedWeight(0.0, 4.0))),
        ("gspo", {}, Surrogate(Clip(0.2, 0.2), ratio="sequence-token")),
    ],
)
def test_gradients_are_those_of_our_own_engine_on_the_same_batch(loss, config, surrogate):
    learner = tenant(tiny_base())
    batch = recipe("dr_grpo").credit(random_episodes(np.random.default_rng(2)))
    data = []
    for d in datum_arrays(replace(batch, advantages=batch.advantages * batch.weights)):
        inputs = {"target_tokens": d.target_tokens, "logprobs": d.logprobs, "advantages": d.advantages}
        data.append(Datum(d.model_input, inputs | ({"sequence_ratio_mask": d.mask} if loss == "gspo" else {})))
    stats, oracle = MLXEngine(learner.model, stop=[0]).gradients(batch, PolicyObjective(surrogate))
    passed = learner.passed(data, loss, config, backward=True)
    assert passed.metrics["loss:sum"] == pytest.approx(stats["loss"], rel=1e-4, abs=1e-6)
    assert_close(flat(learner.gradient), flat(oracle))


def test_steps_are_those_of_decoupled_adamw_in_float64():
    learner, rng = tenant(tiny_base()), np.random.default_rng(3)
    x = flat(arrays(learner))
    m, v = ({name: np.zeros_like(value) for name, value in x.items()} for _ in "mv")
    settings = [
        Adam(1e-2, 0.9, 0.95, 1e-12, 0.0, 0.0),
        Adam(3e-3, 0.8, 0.9, 1e-6, 0.1, 0.5),
        Adam(1e-2, 0.9, 0.99, 1e-8, 0.0, 0.0),  # without a gradient: the moments go on
        Adam(1e-3, 0.0, 0.5, 1e-8, 0.3, 1e9),
    ]
    for t, adam in enumerate(settings, start=1):
        if t != 3:
            learner.passed([made(rng, 6, cross_entropy=True)], "cross_entropy", {}, backward=True)
        g = {name: np.zeros_like(value) for name, value in x.items()} if t == 3 else flat(learner.gradient)
        norm = np.sqrt(sum((value**2).sum() for value in g.values()))
        scale = min(1.0, adam.clip / norm) if adam.clip and norm else 1.0
        for name, value in x.items():
            m[name] = adam.beta1 * m[name] + (1 - adam.beta1) * scale * g[name]
            v[name] = adam.beta2 * v[name] + (1 - adam.beta2) * (scale * g[name]) ** 2
            hat = m[name] / (1 - adam.beta1**t), v[name] / (1 - adam.beta2**t)
            x[name] = value - adam.learning_rate * (hat[0] / (np.sqrt(hat[1]) + adam.eps) + adam.weight_decay * value)
        assert learner.step(adam)["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert learner.gradient is None
        assert_close(flat(arrays(learner)), x, tolerance=2e-5)


def test_gradients_add_up_over_calls_and_losses():
    base, rng = tiny_base(), np.random.default_rng(4)
    one, many = tenant(base), tenant(base)
    data = [made(rng, n, cross_entropy=True) for n in (3, 7, 5)]
    rest = [made(rng, 4)]
    one.passed(data, "cross_entropy", {}, backward=True)
    one.passed(rest, "ppo", {}, backward=True)
    for datum in data:
        many.passed([datum], "cross_entropy", {}, backward=True)
        many.passed([datum], "cross_entropy", {}, backward=False)
    many.passed(rest, "ppo", {}, backward=True)
    assert_close(flat(many.gradient), flat(one.gradient), tolerance=1e-5)


def trained(learner, seed, steps=2):
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        learner.passed([made(rng, 5, cross_entropy=True)], "cross_entropy", {}, backward=True)
        learner.step(Adam(1e-2))
    return learner


def test_two_adapters_side_by_side_learn_what_each_would_alone():
    alone = [trained(tiny_base().learner(Adapter(rank=r, seed=r)), r) for r in (2, 3)]
    base = tiny_base()
    together = [base.learner(Adapter(rank=r, seed=r)) for r in (2, 3)]
    rngs = [np.random.default_rng(r) for r in (2, 3)]
    for _ in range(2):
        for learner, rng in zip(together, rngs, strict=True):
            learner.passed([made(rng, 5, cross_entropy=True)], "cross_entropy", {}, backward=True)
        for learner in together:
            learner.step(Adam(1e-2))
    for a, b in zip(alone, together, strict=True):
        for name, value in arrays(a).items():
            assert mx.array_equal(value, arrays(b)[name]), name


def test_the_base_is_in_memory_once_and_stays_as_it_was():
    base = tiny_base()
    before = {name: np.array(value) for name, value in flat(base.model.parameters()).items()}
    q = base.learner(Adapter(rank=2)).model.layers[0].self_attn.q_proj
    other = trained(tenant(base), 0).model.layers[0].self_attn.q_proj
    assert q.linear.weight is other.linear.weight is base.model.layers[0].self_attn.q_proj.weight
    after = flat(base.model.parameters())
    assert all(np.array_equal(after[name], value) for name, value in before.items())


def test_a_sampler_keeps_its_weights_when_the_learner_moves_on():
    base = tiny_base()
    learner = tenant(base)
    weights, prompt = learner.weights(), np.arange(1, 9)
    before = base.read(weights, prompt).logprobs
    trained(learner, 1)
    assert np.array_equal(base.read(weights, prompt).logprobs, before, equal_nan=True)
    assert not np.allclose(base.read(learner.weights(), prompt).logprobs[1:], before[1:])


def test_a_saved_learner_goes_on_bit_for_bit(tmp_path):
    base = tiny_base()
    learner = trained(tenant(base), 1)
    learner.save(tmp_path / "saved")
    resumed = tiny_base().loaded(tmp_path / "saved", optimizer=True)
    late = base.learner(Adapter(rank=2))
    late.load(tmp_path / "saved", optimizer=True)
    fresh = base.loaded(tmp_path / "saved", optimizer=False)
    for other in (learner, resumed, late, fresh):
        trained(other, 9)
    for name, value in arrays(learner).items():
        assert mx.array_equal(value, arrays(resumed)[name])
        assert mx.array_equal(value, arrays(late)[name])
    assert any(not mx.array_equal(value, arrays(fresh)[name]) for name, value in arrays(learner).items())


def test_saved_weights_are_an_adapter_that_load_model_and_mlx_lm_read(tmp_path):
    from mlx_lm.tuner.utils import load_adapters

    base = tiny_base()
    learner, prompt = tenant(base), np.arange(1, 9)
    expected = base.read(learner.weights(), prompt).logprobs
    learner.weights().save(tmp_path / "sampler")
    learner.save(tmp_path / "learner")
    for name in ("sampler", "learner"):
        assert read_adapter(tmp_path / name).record is not None
        again = base.read(base.sampler(tmp_path / name), prompt).logprobs
        assert np.array_equal(again, expected, equal_nan=True)
        ours = load_adapter(twin(base.model), tmp_path / name)
        theirs = load_adapters(twin(base.model), str(tmp_path / name))
        for model in (ours, theirs.eval()):
            found = np.array(picked(model, Datum(prompt[:-1], {"target_tokens": prompt[1:]})))
            np.testing.assert_allclose(found, expected[1:], atol=1e-5)


@pytest.mark.parametrize("part", ["mlp", "attention", "unembed"])
def test_only_the_layers_asked_for_are_adapted(part):
    settings = {name: name == part for name in ("mlp", "attention", "unembed")}
    names = set(arrays(tiny_base().learner(Adapter(rank=2, **settings))))
    expected = {"mlp": "mlp.", "attention": "self_attn.", "unembed": "embed_tokens."}[part]
    assert names
    assert all(expected in name for name in names)


def bad(**changes):
    datum = made(np.random.default_rng(0), 4)
    inputs = {**datum.inputs, **{k: v for k, v in changes.items() if k != "tokens"}}
    return [Datum(changes.get("tokens", datum.tokens), {k: v for k, v in inputs.items() if v is not None})]


REFUSED = {
    "the unpublished loss": ("stable_reinforce", {}, bad(), "importance_sampling"),
    "an unknown loss": ("pppo", {}, bad(), "did you mean 'ppo'"),
    "an unknown setting": ("ppo", {"clip": 1.0}, bad(), "'clip'"),
    "a setting of another loss": ("importance_sampling", {"beta": 1.0}, bad(), "'beta'"),
    "a setting that is text": ("ppo", {"clip_low_threshold": "low"}, bad(), "clip_low_threshold"),
    "crossed thresholds": ("ppo", {"clip_low_threshold": 3.0}, bad(), "clip_high_threshold"),
    "dro without beta": ("dro", {}, bad(), "beta"),
    "no data": ("ppo", {}, [], "at least one datum"),
    "a missing input": ("ppo", {}, bad(advantages=None), "advantages"),
    "an input it does not read": ("ppo", {}, bad(weights=np.ones(4)), "weights"),
    "unequal lengths": ("ppo", {}, bad(advantages=np.ones(3)), "(3,)"),
    "targets of another length": ("ppo", {}, bad(target_tokens=np.ones(3, int)), "(3,)"),
    "targets of two axes": ("ppo", {}, bad(target_tokens=np.ones((4, 2), int)), "(4, 2)"),
    "no tokens": ("ppo", {}, bad(tokens=np.zeros(0, int)), "0 tokens"),
    "too many tokens": ("ppo", {}, bad(tokens=np.ones(999, int)), "999"),
    "tokens beyond the vocabulary": ("ppo", {}, bad(tokens=np.full(4, 300)), "300"),
    "targets beyond it": ("ppo", {}, bad(target_tokens=np.full(4, 301)), "301"),
    "negative targets": ("ppo", {}, bad(target_tokens=np.full(4, -1)), "-1"),
    "fractions of tokens": ("ppo", {}, bad(target_tokens=np.full(4, 0.5)), "token ids"),
    "an advantage that is not finite": ("ppo", {}, bad(advantages=np.full(4, np.nan)), "advantages"),
    "an advantage beyond float32": ("ppo", {}, bad(advantages=np.full(4, 1e300)), "float32"),
    "an advantage that overflows": ("importance_sampling", {}, bad(advantages=np.full(4, 3e38)), "not finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_in_a_sentence_and_nothing_changes(case):
    loss, config, data, said = REFUSED[case]
    learner = tenant(tiny_base())
    learner.passed(bad(), "ppo", {}, backward=True)
    before = flat(learner.gradient)
    with pytest.raises(UserError) as refused:
        learner.passed(data, loss, config, backward=True)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert_close(flat(learner.gradient), before, tolerance=0)


@pytest.mark.parametrize("adam", [Adam(float("nan")), Adam(-1.0), Adam(beta1=1.0), Adam(clip=-1.0), Adam(1e38)])
def test_a_step_that_cannot_be_changes_nothing(adam):
    learner = tenant(tiny_base())
    learner.passed(bad(), "ppo", {}, backward=True)
    before, gradient = flat(arrays(learner)), flat(learner.gradient)
    with pytest.raises((UserError, NotFiniteError)):
        learner.step(replace(adam, weight_decay=1e5 if adam.learning_rate > 1 else 0.0))
    assert_close(flat(arrays(learner)), before, tolerance=0)
    assert_close(flat(learner.gradient), gradient, tolerance=0)
    assert int(learner.optimizer.step.item()) == 0
    learner.step(Adam())


@pytest.mark.parametrize(
    ("family", "left_out"),
    [
        ("gemma3n", {"correction_coefs", "prediction_coefs"}),
        ("kimi_k3", {"mlp_res_proj", "self_attention_res_proj"}),
        ("gemma3_text", set()),
    ],
)
def test_layers_whose_weights_a_model_reads_itself_are_left_out_of_an_adapter(family, left_out):
    base = tiny_base(tiny_family(family), context=None)
    learner = base.learner(Adapter(rank=4))
    adapted = {name.rpartition(".")[0] for name in arrays(learner)}
    inside = {id(part) for block in base.model.layers for part in block.modules()}
    linear = {n for n, part in base.model.named_modules() if isinstance(part, nn.Linear) and id(part) in inside}
    assert {name.rpartition(".")[2] for name in linear - adapted} == left_out
    datum = Datum(np.array([3, 5, 7]), {"target_tokens": np.array([5, 7, 9]), "weights": np.ones(3)})
    losses = []
    for _ in range(2):
        losses.append(learner.passed([datum], "cross_entropy", {}, backward=True).metrics["loss:sum"])
        learner.step(Adam(learning_rate=1e-2))
    assert losses[1] < losses[0]
