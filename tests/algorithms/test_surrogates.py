"""Every objective, ratio, KL and correction against one token at a time in plain Python, values and slopes."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textpolicy.errors import UserError
from textpolicy.losses import (
    KL,
    Clip,
    ClippedWeight,
    Correction,
    ImportanceSampling,
    SoftGate,
    Surrogate,
    Tokens,
    correction_weights,
    importance_ratio,
    kl_estimate,
    policy_objective,
)
from textpolicy.types import Batch, loss_weights

OBJECTIVES = [
    Clip(0.2, 0.28),
    Clip(0.1, 0.3, delta=1.6),
    Clip(0.2, 0.2, dual_clip=1.5),
    Clip(0.2, 0.2, delta=2.0, dual_clip=1.3),
    ClippedWeight(),
    ClippedWeight(0.8, 1.28),
    ClippedWeight(None, None),
    SoftGate(),
    SoftGate(2.0, 0.7),
    ImportanceSampling(),
]
RATIOS = ["token", "sequence", "sequence-token", "sequence-sum", "sequence-mean"]
ESTIMATORS = ["k1", "k2", "k3", "abs", "k1+", "k3+"]
CORRECTIONS = [
    Correction("token", "truncate", None, 1.2),
    Correction("token", "truncate", 0.9, 1.2),
    Correction("token", "mask", 0.8, 1.3),
    Correction("sequence", "truncate", 0.5, 1.5),
    Correction("sequence", "mask", None, 1.4),
    Correction("geometric", "mask", 0.85, 1.15),
]

# ---- the oracle: ``free`` are the log-probs that move, ``held`` the same numbers where a gradient is stopped


def slow_loss(free, held, batch, how):
    """The surrogate over nested lists, as the papers sum it; the batch holds float64."""
    total = 0.0
    for i, weights in enumerate(batch.weights):
        live = [t for t in range(len(weights)) if weights[t] != 0]
        o = slow_denominator(free[i], held[i], batch, i, live, how)
        log_r = {t: free[i][t] - o[t] for t in live}
        held_log_r = {t: held[i][t] - slow_denominator(held[i], held[i], batch, i, live, how)[t] for t in live}
        c = slow_correction(o, batch.logprobs[i], live, how.correction)
        late = {t: held[i][t] - batch.logprobs[i][t] for t in live}
        stale = how.off_policy_limit is not None and -mean(late.values()) > how.off_policy_limit
        for t in live:
            r, held_r = slow_ratio(log_r, held_log_r, t, how.ratio)
            a = batch.advantages[i][t]
            j = 0.0 if stale and a < 0 else slow_objective(how.objective, r, held_r, free[i][t], a)
            total -= weights[t] * c[t] * j
            if how.kl is not None:
                estimate = slow_kl(free[i][t], held[i][t], batch.reference[i][t], how.kl)
                total += weights[t] * how.kl.coefficient * estimate * slow_kl_weight(log_r[t], held_log_r[t], how.kl)
    return total


def slow_denominator(free, held, batch, i, live, how):
    if how.correction is None:
        return {t: batch.logprobs[i][t] for t in live}
    return {t: held[t] if batch.old is None else batch.old[i][t] for t in live}


def slow_ratio(log_r, held, t, level):
    """The ratio, and its value where the gradient is stopped."""
    if level == "token":
        return math.exp(log_r[t]), math.exp(held[t])
    if level == "sequence":
        return math.exp(mean(log_r.values())), math.exp(mean(held.values()))
    if level == "sequence-token":
        s = math.exp(mean(held.values()))
        return s * math.exp(log_r[t] - held[t]), s
    if level == "sequence-sum":
        return math.exp(sum(log_r.values())), math.exp(sum(held.values()))
    return mean(math.exp(x) for x in log_r.values()), mean(math.exp(x) for x in held.values())


def slow_objective(objective, r, held_r, l, a):
    match objective:
        case Clip(low, high, delta, dual):
            free = r if delta is None or r < delta else delta
            inside = 1 - low if r < 1 - low else 1 + high if r > 1 + high else r
            j = free * a if free * a < inside * a else inside * a
            return dual * a if dual is not None and a < 0 and j < dual * a else j
        case ClippedWeight(low, high):
            w = held_r if high is None or held_r < high else high
            return (w if low is None or w > low else low) * a * l
        case SoftGate(positive, negative):
            tau = positive if a > 0 else negative
            return 4 / tau * a / (1 + math.exp(-tau * (r - 1)))
    return r * a


def slow_correction(o, sampler, live, how):
    """One factor per live token."""
    if how is None:
        return dict.fromkeys(live, 1.0)
    d = {t: 0.0 if math.isnan(sampler[t]) else o[t] - sampler[t] for t in live}
    out = {}
    for t in live:
        w = math.exp({"token": d[t], "sequence": sum(d.values()), "geometric": mean(d.values())}[how.level])
        low = how.low or 0.0
        if how.how == "truncate":
            out[t] = min(max(w, low), how.high)
        else:
            out[t] = 0.0 if w < low or w > how.high else 1.0 if how.level == "geometric" else w
    return out


def slow_kl(l, held, q, kl):
    d, rest = q - l, q - held
    return {
        "k1": -d,
        "k2": d * d / 2,
        "k3": math.exp(d) - d - 1,
        "abs": abs(d),
        "k1+": -rest + d * d / 2 - rest * rest / 2,
        "k3+": math.exp(rest) - rest - 1 + d * d / 2 - rest * rest / 2,
    }[kl.estimator]


def slow_kl_weight(log_r, held, kl):
    """The ratio; constant beside k2 and its likes, which have the right slope without it."""
    if not kl.importance_weighted:
        return 1.0
    return math.exp(held if kl.estimator in ("k2", "k1+", "k3+") else log_r)


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else 0.0


# ---- made-up batches: masks with holes, an empty row, junk wherever nothing was sampled


def made_batch(rng, shape=(4, 6)):
    live = rng.random(shape) < 0.6
    live[-1] = False

    def junk_outside(values):
        return np.where(live, values, np.nan)

    old = rng.normal(-2, 1, shape)
    return Batch(
        inputs=np.zeros(shape, np.int32),
        targets=np.zeros(shape, np.int32),
        logprobs=junk_outside(old + rng.normal(0, 0.15, shape)),
        advantages=np.where(live, rng.normal(0, 1, shape), 0),
        weights=np.where(live, rng.uniform(0.1, 1, shape), 0),
        temperatures=np.ones((shape[0], 1)),
        old=junk_outside(old),
        reference=junk_outside(old + rng.normal(0, 0.5, shape)),
    )


def drifted(rng, batch):
    """What the learner says now."""
    return batch.old + rng.normal(0, 0.3, batch.old.shape)


def in_mlx(batch):
    return batch.map(lambda array: mx.array(array.astype(np.float32)))


def slopes(logprobs, batch, how):
    """Central differences of the oracle, with everything that is stopped held where it is."""
    out = np.zeros(logprobs.shape)
    for place in np.argwhere(batch.weights != 0):
        up, down = logprobs.copy(), logprobs.copy()
        up[tuple(place)] += 1e-6
        down[tuple(place)] -= 1e-6
        out[tuple(place)] = (slow_loss(up, logprobs, batch, how) - slow_loss(down, logprobs, batch, how)) / 2e-6
    return out


def agree(logprobs, batch, how):
    """NumPy's value, and MLX's value and gradient, are the oracle's."""
    expected = slow_loss(logprobs, logprobs, batch, how)
    assert policy_objective(logprobs, batch, np, how) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    at = mx.array(logprobs.astype(np.float32))
    loss, gradient = mx.value_and_grad(lambda l: policy_objective(l, in_mlx(batch), mx, how))(at)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    np.testing.assert_allclose(np.array(gradient), slopes(logprobs, batch, how), rtol=2e-3, atol=2e-5)


SEEDS = st.integers(0, 10**6)
made = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_every_objective_at_every_ratio_is_the_slow_loop_in_value_and_slope(objective, ratio):
    rng = np.random.default_rng(OBJECTIVES.index(objective))
    batch = made_batch(rng)
    agree(drifted(rng, batch), batch, Surrogate(objective, ratio))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_kl_is_the_slow_loop_in_value_and_slope(estimator, weighted):
    rng = np.random.default_rng(ESTIMATORS.index(estimator))
    batch = made_batch(rng)
    agree(drifted(rng, batch), batch, Surrogate(kl=KL(0.3, estimator, weighted)))


@pytest.mark.parametrize("updates", ["the only update", "one of several"])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("correction", CORRECTIONS, ids=str)
def test_every_correction_is_the_slow_loop_in_value_and_slope(correction, ratio, updates):
    rng = np.random.default_rng(CORRECTIONS.index(correction))
    batch = made_batch(rng)
    batch = replace(batch, old=None) if updates == "the only update" else batch
    logprobs = drifted(rng, made_batch(np.random.default_rng(CORRECTIONS.index(correction))))
    agree(logprobs, batch, Surrogate(Clip(0.2, 0.28), ratio, KL(0.1), correction))


@made
@given(
    SEEDS, st.sampled_from(OBJECTIVES), st.sampled_from(RATIOS), st.sampled_from([None, *CORRECTIONS]), st.booleans()
)
def test_any_combination_is_the_slow_loop(seed, objective, ratio, correction, limited):
    rng = np.random.default_rng(seed)
    batch = made_batch(rng)
    logprobs = drifted(rng, batch)
    kl = KL(0.2, ESTIMATORS[seed % 6], bool(seed % 2)) if seed % 3 else None
    agree(logprobs, batch, Surrogate(objective, ratio, kl, correction, 0.05 if limited else None))


# ---- what the loops do not show: hand-worked corners


def one_token(ratio, advantage, objective):
    """(J, dJ/dl) at a token of this ratio whose log-prob is -1, through MLX."""
    batch = in_mlx(one_row([-1 - math.log(ratio)], [advantage]))
    j, slope = mx.value_and_grad(lambda l: -policy_objective(l, batch, mx, Surrogate(objective)))(mx.array([[-1.0]]))
    return j.item(), slope.item()


def one_row(sampler, advantages, **more):
    row = np.array([sampler], np.float64)
    nothing = np.zeros(row.shape, np.int32)
    return Batch(nothing, nothing, row, np.array([advantages], float), np.ones(row.shape), np.ones((1, 1)), **more)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (3.0, -2.0, -6.0, -6.0),  # one-sided clipping lets it grow without bound
        (5.0, -2.0, -8.0, 0.0),  # delta = 4 stops it
        (5.0, 2.0, 2.4, 0.0),  # and changes nothing for a success
    ],
)
def test_delta_caps_the_ratio_of_a_failure(ratio, advantage, value, slope):
    assert one_token(ratio, advantage, Clip(0.2, 0.2, delta=4.0)) == pytest.approx((value, slope), rel=1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (2.0, -2.0, -4.0, -4.0),
        (5.0, -2.0, -6.0, 0.0),  # 3 x the advantage
        (0.5, -2.0, -1.6, 0.0),  # PPO's own clip, on the other side
        (5.0, 2.0, 2.4, 0.0),
        (0.5, 2.0, 1.0, 1.0),
    ],
)
def test_dual_clip_bounds_the_loss_of_a_failure_only(ratio, advantage, value, slope):
    assert one_token(ratio, advantage, Clip(0.2, 0.2, dual_clip=3.0)) == pytest.approx((value, slope), rel=1e-5)


@pytest.mark.parametrize("clip", [Clip(0.0, 0.0), Clip(0.0, 0.2), Clip(0.2, 0.0)])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_on_policy_the_slope_is_the_advantage_however_narrow_the_clip(clip, advantage):
    assert one_token(1.0, advantage, clip) == pytest.approx((advantage, advantage))


@pytest.mark.parametrize(("ratio", "slope"), [(0.5, 0.5), (1.0, 1.0), (9.0, 5.0)])
def test_cispo_keeps_the_gradient_of_every_token_and_caps_its_weight(ratio, slope):
    assert one_token(ratio, 1.0, ClippedWeight())[1] == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize(("advantage", "slope"), [(2.0, 2.0), (-2.0, -2.0)])
def test_the_soft_gate_has_the_slope_of_the_advantage_on_policy(advantage, slope):
    assert one_token(1.0, advantage, SoftGate())[1] == pytest.approx(slope, rel=1e-5)


def at(ratio, advantages):
    """Tokens whose log-probs do not matter."""
    return Tokens(np.array(ratio), np.zeros(()), np.zeros(()), np.array(advantages))


def test_where_clipping_is_reported_there_is_no_gradient_and_nowhere_else():
    for ratio in (0.3, 0.75, 0.85, 1.0, 1.15, 1.35, 3.0):
        for advantage in (-1.0, 1.0):
            low, high = Clip(0.2, 0.28).clipped(at(ratio, advantage), np)
            assert (low or high) == (one_token(ratio, advantage, Clip(0.2, 0.28))[1] == 0), (ratio, advantage)


@pytest.mark.parametrize("objective", [SoftGate(), ImportanceSampling()], ids=str)
def test_an_objective_that_never_clips_reports_no_clipping(objective):
    low, high = objective.clipped(at([0.01, 1.0, 99.0], [1.0, -1.0, 1.0]), np)
    assert not (low | high).any()


def test_a_cispo_weight_outside_its_bounds_is_reported_as_clipped():
    low, high = ClippedWeight(0.8, 1.28).clipped(at([0.7, 1.0, 1.3], 1.0), np)
    assert (low.tolist(), high.tolist()) == ([True, False, False], [False, False, True])
    assert not np.any(ClippedWeight(None, None).clipped(at([1e-9, 1e9], 1.0), np))


def test_ratios_of_a_row_by_hand():
    log_r = np.log([[2.0, 8.0, 1.0], [3.0, 1.0, 1.0], [1.0, 1.0, 1.0]])
    live = np.array([[True, True, False], [True, False, False], [False] * 3])
    values = {level: importance_ratio(np.where(live, log_r, 0), live, level, np) for level in RATIOS}
    assert values["token"][:, :2] == pytest.approx(np.array([[2, 8], [3, 1], [1, 1]]))
    for level, of_rows in [("sequence", [4, 3, 1]), ("sequence-sum", [16, 3, 1]), ("sequence-mean", [5, 3, 1])]:
        assert values[level] == pytest.approx(np.array(of_rows)[:, None]), level
    assert values["sequence-token"] == pytest.approx(np.repeat(values["sequence"], 3, axis=1))


def weights(d, how, sampler_known=None):
    """Correction weights of one row from d = o - b."""
    old, sampler = np.zeros((1, len(d))), -np.array([d], float)
    sampler = sampler if sampler_known is None else np.where(sampler_known, sampler, np.nan)
    live = np.ones(old.shape, bool)
    return np.broadcast_to(correction_weights(old, sampler, live, how, np), old.shape)[0].tolist()


TWO, HALF = math.log(2), -math.log(2)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (Correction("token", "truncate", None, 1.5), [1.5, 0.5, 1.5]),
        (Correction("token", "truncate", 0.8, 1.5), [1.5, 0.8, 1.5]),
        (Correction("token", "mask", 0.8, 3.0), [2.0, 0.0, 2.0]),
        (Correction("sequence", "truncate", None, 1.5), [1.5] * 3),
        (Correction("sequence", "mask", None, 3.0), [2.0] * 3),
        (Correction("sequence", "mask", None, 1.9), [0.0] * 3),
        (Correction("geometric", "mask", 0.9, 1.3), [1.0] * 3),  # 2 ** (1 / 3) = 1.26
        (Correction("geometric", "mask", 0.9, 1.2), [0.0] * 3),
    ],
    ids=str,
)
def test_corrections_by_hand(how, expected):
    assert weights([TWO, HALF, TWO], how) == pytest.approx(expected)


def test_a_token_whose_sampler_logprob_is_missing_weighs_1_and_leaves_its_row_alone():
    known = np.array([True, False, True])
    assert weights([TWO, 9.0, HALF], Correction("token", "truncate", None, 5.0), known) == pytest.approx([2, 1, 0.5])
    assert weights([TWO, 9.0, TWO], Correction("sequence", "mask", None, 5.0), known) == pytest.approx([4] * 3)
    assert weights([9.0] * 3, Correction("geometric"), known & False) == [1.0] * 3


def test_missing_sampler_logprobs_stay_out_of_loss_and_gradient():
    how = Surrogate(correction=Correction("token", "truncate"))
    missing = one_row([np.nan, -1.0], [1.0, 1.0])
    at = mx.array([[-1.0, -1.0]])
    loss, gradient = mx.value_and_grad(lambda l: policy_objective(l, in_mlx(missing), mx, how))(at)
    assert (loss.item(), gradient.tolist()) == (-2.0, [[-1.0, -1.0]])


@pytest.mark.parametrize("correction", [None, Correction("sequence", "truncate")], ids=str)
def test_failures_of_a_sequence_that_has_drifted_too_far_are_dropped_and_successes_kept(correction):
    batch = one_row([-1.0, -1.0], [-1.0, 2.0])
    drifted_by_half = mx.array([[-1.6, -1.4]])

    def gradient(limit):
        how = Surrogate(ImportanceSampling(), correction=correction, off_policy_limit=limit)
        return mx.grad(lambda l: policy_objective(l, in_mlx(batch), mx, how))(drifted_by_half)[0].tolist()

    kept, dropped = gradient(0.6), gradient(0.4)
    assert kept[0] > 0 > kept[1]
    assert dropped == [0.0, kept[1]]


def test_k3_times_the_ratio_has_the_gradient_of_the_kl_itself():
    """Enumerated: sum_y b(y) f_y with f = r k3 has the gradient of KL(pi || q), for samples of any b."""
    logits, q, b = np.array([0.3, -0.5, 1.1]), np.array([0.2, 0.5, 0.3]), np.array([0.5, 0.2, 0.3])

    def log_softmax(z):
        return z - np.log(np.exp(z).sum())

    def exact(z):
        return (np.exp(log_softmax(z)) * (log_softmax(z) - np.log(q))).sum()

    def expected(z, estimator):
        batch = in_mlx(
            replace(one_row(np.log(b), [0.0] * 3, reference=np.log(q)[None]), weights=b[None], inputs=np.zeros((1, 3)))
        )
        how = Surrogate(kl=KL(1.0, estimator))
        return mx.grad(lambda z: policy_objective((z - mx.logsumexp(z))[None], batch, mx, how))(mx.array(z))

    step = 1e-5 * np.eye(3)
    true = [(exact(logits + h) - exact(logits - h)) / 2e-5 for h in step]
    for estimator in ("k1", "k3", "k2", "k3+"):
        assert expected(logits.astype(np.float32), estimator).tolist() == pytest.approx(true, abs=1e-4), estimator


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_limit_keeps_the_distance_of_a_kl_within_bounds(estimator):
    far, near = (kl_estimate(np.array([x]), np.zeros(1), estimator, np, limit=20) for x in (-500.0, -20.0))
    assert far == near


# ---- weights


def slow_weights(mask, aggregation, length, empty_rows):
    rows = len(mask) if empty_rows == "counted" else sum(any(row) for row in mask)
    total = sum(sum(row) for row in mask)
    divisor = {
        "token-mean": lambda row: total,
        "seq-mean-token-mean": lambda row: rows * sum(row),
        "seq-mean-token-sum": lambda row: rows,
        "seq-mean-token-sum-norm": lambda row: rows * length,
        "token-sum": lambda row: 1,
    }[aggregation]
    return [[1 / divisor(row) if live else 0.0 for live in row] for row in mask]


@pytest.mark.parametrize("empty_rows", ["excluded", "counted"])
@pytest.mark.parametrize(
    "aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-sum"]
)
@made
@given(st.integers(0, 10**6))
def test_weights_are_the_slow_loop_with_holes_and_empty_rows(aggregation, empty_rows, seed):
    mask = np.random.default_rng(seed).random((4, 5)) < 0.4
    ours = loss_weights(mask, aggregation, 7.0, empty_rows)
    assert ours == pytest.approx(np.array(slow_weights(mask.tolist(), aggregation, 7.0, empty_rows)), rel=1e-12)


@pytest.mark.parametrize(
    ("aggregation", "empty_rows", "expected"),
    [
        ("token-mean", "excluded", [1 / 3, 1 / 3]),
        ("seq-mean-token-mean", "excluded", [1 / 4, 1 / 2]),
        ("seq-mean-token-mean", "counted", [1 / 6, 1 / 3]),
        ("seq-mean-token-sum", "excluded", [1 / 2, 1 / 2]),
        ("seq-mean-token-sum-norm", "counted", [1 / 30, 1 / 30]),
        ("token-sum", "excluded", [1, 1]),
    ],
)
def test_weights_by_hand(aggregation, empty_rows, expected):
    """A row of two tokens around a hole, one of one, and an empty one."""
    w = loss_weights(np.array([[1, 0, 1], [0, 1, 0], [0, 0, 0]]), aggregation, 10, empty_rows)
    assert [w[0, 0], w[1, 1]] == pytest.approx(expected)
    assert w[0, 0] == w[0, 2]
    assert np.count_nonzero(w) == 3


@pytest.mark.parametrize("empty_rows", ["excluded", "counted"])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_without_a_token_every_weight_is_0(aggregation, empty_rows):
    assert loss_weights(np.zeros((2, 3)), aggregation, 4, empty_rows).tolist() == [[0.0] * 3] * 2


# ---- refusals


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Surrogate(ratio="word"), "there is no ratio level 'word'"),
        (lambda: Surrogate(ratio="sequence_token"), "did you mean 'sequence-token'"),
        (lambda: importance_ratio(np.zeros((1, 1)), np.ones((1, 1), bool), "word", np), "there is no ratio level"),
        (lambda: KL(0.1, "k4"), "there is no KL estimator 'k4'"),
        (lambda: kl_estimate(np.zeros(1), np.zeros(1), "k4", np), "there is no KL estimator 'k4'"),
        (lambda: KL(0.0), "the KL coefficient is 0.0; set it above 0, or leave the KL out"),
        (lambda: KL(-1.0), "the KL coefficient is -1.0"),
        (lambda: KL(math.nan), "the KL coefficient is nan"),
        (lambda: KL(math.inf), "the KL coefficient is inf"),
        (lambda: Correction("row"), "there is no correction level 'row'"),
        (lambda: Correction("token", "drop"), "there is no correction 'drop'"),
        (lambda: Correction("geometric", "truncate"), "cannot truncate; set how to mask"),
        (lambda: Correction(low=2.0, high=1.0), "the correction keeps [2.0, 1.0]; set 0 <= low < high"),
        (lambda: Correction(low=math.nan), "the correction keeps [nan, 3.0]"),
        (lambda: Clip(delta=1.2), "delta is 1.2; set it above 1 + clip_high, 1.2"),
        (lambda: Clip(dual_clip=1.0), "dual_clip is 1.0; set it above 1"),
        (lambda: Clip(math.nan), "the clip range is [1 - nan, 1 + 0.2]; set both to 0 or more"),
        (lambda: ClippedWeight(2.0, 1.0), "the weight range is [2.0, 1.0]; set 0 <= weight_low < weight_high"),
        (lambda: ClippedWeight(-1.0), "the weight range is [-1.0, 5.0]"),
        (lambda: SoftGate(0.0), "tau_pos is 0.0 and tau_neg 1.05; set both above 0"),
        (lambda: SoftGate(1.0, math.nan), "tau_pos is 1.0 and tau_neg nan"),
        (lambda: loss_weights(np.ones((1, 1)), "mean"), "there is no aggregation 'mean'; choose one of"),
        (lambda: loss_weights(np.ones((1, 1)), "seq-mean-token-sum-norm"), "divides by a length and got None"),
        (lambda: loss_weights(np.ones((1, 1)), "seq-mean-token-sum-norm", 0.0), "divides by a length and got 0.0"),
        (
            lambda: policy_objective(np.zeros((1, 1)), one_row([0.0], [1.0]), np, Surrogate(kl=KL(0.1))),
            "the loss has a KL penalty and the batch no reference log-probs; score them first",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_sentence(build, sentence):
    with pytest.raises(UserError) as error:
        build()
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
