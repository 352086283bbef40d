"""One model, one batch, two engines: the same log-probs and the same gradient of every LoRA matrix."""

import json
import tarfile
from dataclasses import dataclass, replace

import numpy as np
import pytest

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx
from conftest import TINKER_RANK, recipe
from fixed_episodes import fixed_episodes
from mlx.utils import tree_flatten
from safetensors.numpy import load_file

from textpolicy import serving
from textpolicy.config.adapters import LoRA
from textpolicy.mlx.adapters.attach import attach
from textpolicy.mlx.engine import MLXEngine, PolicyObjective
from textpolicy.mlx.models import load_model
from textpolicy.mlx.tenants.model import Base
from textpolicy.serving import Datum
from textpolicy.tinker.engine import Adam
from textpolicy.types import Batch

RECIPES = ("grpo", "dapo", "maxrl", "cispo", "full")
# With beta1 = 0 and an eps far above every gradient, AdamW's step is rate / eps times the gradient itself.
PLAIN = Adam(beta1=0.0, beta2=0.0, eps=1e6)
RATE = 3e5
# The server has one A for each of these, whose gradient is the sum over the modules that share it.
SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass
class Pair:
    """An engine on a server, and the local one that takes over its LoRA."""

    remote: object
    folder: object  # for what is saved
    checkpoints: object  # where the server keeps its own
    model: str
    shares: bool  # whether the server has one A for each of SHARED

    def lora(self):
        """The server's LoRA as mlx-lm names it: X.lora_a (in, r), X.lora_b (r, out)."""
        self.remote.save(self.folder)
        sampler = json.loads((self.folder / "tinker.json").read_text())["sampler"]
        run, *_, name = sampler.removeprefix("tinker://").split("/")
        if not self.shares:
            kept = self.checkpoints / run.replace(":", "-") / "sampler_weights" / name
            return load_file(kept / "adapters.safetensors")
        with tarfile.open(self.checkpoints / run / "sampler_weights" / f"{name}.tar.gz") as archive:
            archive.extractall(self.folder, filter="data")
        return as_mlx(
            {
                name.removeprefix("base_model.model."): w
                for name, w in load_file(next(self.folder.rglob("adapter_model.safetensors"))).items()
            }
        )

    def local(self, lora):
        """The local engine with ``lora``."""
        names = {name.rpartition(".")[0] for name in lora}
        modules = tuple(sorted({n.split(".", 3)[-1] if n.startswith("model.layers.") else n for n in names}))
        trained = {name: mx.array(w) for name, w in lora.items()}
        model = attach(load_model(self.model)[0], LoRA(rank=TINKER_RANK, alpha=32.0, modules=modules))
        assert {name for name, _ in tree_flatten(model.trainable_parameters())} == set(trained)
        model.load_weights(list(trained.items()), strict=False)
        return MLXEngine(model, stop=[257])

    def one_a(self, grads):
        """The gradients as the server has them."""
        return with_shared_a(grads) if self.shares else grads


def as_mlx(lora):
    """Peft's matrices as mlx-lm has them: lora_a (in, r) and lora_b (r, out)."""
    named = {
        name.replace(".lora_A.weight", ".lora_a").replace(".lora_B.weight", ".lora_b"): w.T for name, w in lora.items()
    }
    for group in SHARED:
        for name in [n for n in named if n.endswith(f"{group[0]}.lora_a")]:
            assert all((named[name] == named[name.replace(group[0], other)]).all() for other in group)
    return named


def with_shared_a(grads):
    """The gradients where the modules of a group share their A."""
    out = dict(grads)
    for group in SHARED:
        for name in [n for n in grads if n.endswith(f"{group[0]}.lora_a")]:
            members = [name.replace(group[0], other) for other in group]
            out |= dict.fromkeys(members, sum(grads[m] for m in members))
    return out


@pytest.fixture(params=["ours", "skyrl"])
def pair(request, connected, tmp_path):
    folder = tmp_path / "adapters"
    folder.mkdir()
    if request.param == "ours":
        server = request.getfixturevalue("tinker_server")
        return Pair(connected(server, adam=PLAIN), folder, server.folder / "checkpoints", server.name, shares=False)
    server = request.getfixturevalue("skyrl_server")
    remote = connected(server, adam=PLAIN, reduction="mean")
    return Pair(remote, folder, server.log.parent / "checkpoints", server.name, shares=True)


def credited(name, local, answers=()):
    """A batch of the recipe, sampled by a policy a little away from the learner, so that clipping has work."""
    rng = np.random.default_rng(7)
    episodes = fixed_episodes(2, answers=answers)
    now = local.score(Batch.pack(episodes, [np.zeros(len(e.tokens)) for e in episodes]))
    moved = []
    for e, l in zip(episodes, now, strict=True):
        sampled = np.append(0, l[: len(e.tokens) - 1]) + rng.normal(0, 0.2, len(e.tokens))
        moved.append(replace(e, logprobs=np.where(e.mask, sampled, 0).astype(np.float32)))
    how = recipe(name)
    return how.credit(moved, how.controller()), how.surrogate


def cosine(a, b):
    a, b = (np.concatenate([x[name].ravel() for name in sorted(a)]).astype(np.float64) for x in (a, b))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def both_gradients(pair, batch_of):
    """The gradient of the server, from what one step did to its LoRA, and that of the local engine."""
    before = pair.lora()
    local = pair.local(before)
    batch, surrogate = batch_of(local)
    np.testing.assert_allclose(pair.remote.score(batch), local.score(batch), atol=1e-4)
    _, grads = local.gradients(batch, PolicyObjective(surrogate))
    row = pair.remote.update(batch, surrogate, RATE)
    after = pair.lora()
    remote = {name: (w - after[name]) * (PLAIN.eps / RATE) for name, w in before.items()}
    return remote, pair.one_a({name: np.array(g) for name, g in tree_flatten(grads)}), row


def norm(grads):
    return np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))


def cosines(a, b):
    """Of each matrix by itself, but those that are all zero."""
    return {name: cosine({"": a[name]}, {"": b[name]}) for name in a if np.abs(b[name]).max() > 0}


@pytest.mark.slow
def test_log_probs_and_gradients_of_five_recipes_agree(pair):
    for number, name in enumerate(RECIPES):  # each from where the one before ended
        remote, local, row = both_gradients(pair, lambda engine, name=name: credited(name, engine))
        assert row["updated"] == 1
        assert cosine(remote, local) > 0.9999, name
        found = cosines(remote, local)
        assert len(found) == len(remote) // (2 if number == 0 else 1)  # A has no gradient while B is 0
        assert min(found.values()) > 0.999, name
        if not pair.shares:
            assert norm({n: remote[n] - g for n, g in local.items()}) < 1e-5 * norm(local), name


@pytest.mark.slow
def test_a_server_gives_the_gradient_of_the_sum_for_unequal_lengths_too(pair):
    remote, local, _ = both_gradients(pair, lambda engine: credited("grpo", engine, answers=(6, 2, 5, 1)))
    assert cosine(remote, local) > 0.999
    assert norm(remote) == pytest.approx(norm(local), rel=1e-2)


@pytest.mark.slow
def test_a_datum_shifted_by_one_is_found(pair, monkeypatch):
    right = pair.remote.data

    def unshifted(batch):
        return [replace(d, target_tokens=d.model_input) for d in right(batch)]

    monkeypatch.setattr(pair.remote, "data", unshifted)
    remote, local, row = both_gradients(pair, lambda engine: credited("grpo", engine))
    assert cosine(remote, local) < 0.9
    assert row["logprob_gap_mean"] > 0.5


# ---- the same data, two servers' learners

LOSSES = {  # every loss that both have, with thresholds that bind
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1},
    "cispo": {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1},
}


def data_for(loss, engine, rng):
    """Data of 8 equal lengths for a loss: the tokens, and the inputs by name; sampled a little away from ``engine``."""
    episodes = fixed_episodes(4)
    batch = Batch.pack(episodes, [np.zeros(len(e.tokens)) for e in episodes])
    l = engine.score(batch)
    out = []
    for tokens, targets, row in zip(batch.inputs, batch.targets, l, strict=True):
        n = len(targets)
        if loss == "cross_entropy":
            weights = rng.random(n).astype(np.float32)
            inputs = {"weights": weights / weights.sum()}
        else:
            sampled = (row[:n] + rng.normal(0, 0.2, n)).astype(np.float32)
            inputs = {"logprobs": sampled, "advantages": rng.standard_normal(n).astype(np.float32)}
        out.append(Datum(tokens, {"target_tokens": targets.astype(np.int64), **inputs}))
    return out


def wire(sdk, datum):
    kinds = {"i": "int64", "f": "float32"}
    inputs = {k: sdk.TensorData(data=v.tolist(), dtype=kinds[v.dtype.kind]) for k, v in datum.inputs.items()}
    return sdk.Datum(model_input=sdk.ModelInput.from_ints(datum.tokens.tolist()), loss_fn_inputs=inputs)


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["skyrl"], indirect=True)
def test_our_learner_has_skyrls_losses_and_gradients_on_the_same_data(pair, tmp_path):
    sdk = pytest.importorskip("tinker").types
    trainer, rng = pair.remote._trainer, np.random.default_rng(5)
    for number, (loss, config) in enumerate(LOSSES.items()):
        before = pair.lora()
        local = pair.local(before)
        local.save(tmp_path / loss)
        learner = Base("tiny", *load_model(pair.model)).loaded(tmp_path / loss, optimizer=False)
        data = data_for(loss, local, rng)
        n = len(data[0].tokens)
        ours = learner.passed(data, loss, config, backward=True)
        theirs = trainer.forward_backward([wire(sdk, d) for d in data], loss, config or None).result()
        total = 0.0
        for mine, output in zip(ours.logprobs, theirs.loss_fn_outputs, strict=True):
            np.testing.assert_allclose(mine, output["logprobs"].data, atol=1e-4)
            total += float(np.sum(output["elementwise_loss"].data))
        assert ours.metrics["loss:sum"] == pytest.approx(total, rel=1e-4)
        learner.step(serving.Adam(RATE, PLAIN.beta1, PLAIN.beta2, PLAIN.eps))
        trainer.optim_step(sdk.AdamParams(learning_rate=RATE, beta1=0.0, beta2=0.0, eps=PLAIN.eps)).result()
        after, start = pair.lora(), before
        moved = {name: np.array(w) for name, w in tree_flatten(learner.model.trainable_parameters())}
        # theirs is the mean over data of the mean over a datum's weights
        per = (1 if loss == "cross_entropy" else n) * len(data)
        remote = {name: (start[name] - after[name]) * (PLAIN.eps / RATE) * per for name in start}
        mine = pair.one_a({name: (start[name] - moved[name]) * (PLAIN.eps / RATE) for name in start})
        assert cosine(remote, mine) > 0.9999, loss
        found = cosines(remote, mine)
        assert len(found) == len(remote) // (2 if number == 0 else 1)
        assert min(found.values()) > 0.999, loss
        assert norm(remote) == pytest.approx(norm(mine), rel=1e-3), loss
