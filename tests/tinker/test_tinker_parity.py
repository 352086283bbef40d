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

from textpolicy.config.adapters import LoRA
from textpolicy.mlx.adapters.attach import attach
from textpolicy.mlx.engine import MLXEngine, PolicyObjective
from textpolicy.mlx.models import load_model
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
    """An engine on the server, and the local one that takes over its LoRA."""

    remote: object
    folder: object  # for what is saved
    checkpoints: object  # where the server keeps its own
    model: str

    def lora(self):
        """The server's LoRA by peft's names without their prefix: X.lora_A.weight (r, in), X.lora_B.weight (out, r)."""
        self.remote.save(self.folder)
        sampler = json.loads((self.folder / "tinker.json").read_text())["sampler"]
        run, *_, name = sampler.removeprefix("tinker://").split("/")
        with tarfile.open(self.checkpoints / run / "sampler_weights" / f"{name}.tar.gz") as archive:
            archive.extractall(self.folder, filter="data")
        return {
            name.removeprefix("base_model.model."): w
            for name, w in load_file(next(self.folder.rglob("adapter_model.safetensors"))).items()
        }

    def local(self, lora):
        """The local engine with ``lora``."""
        model = attach(load_model(self.model)[0], LoRA(rank=TINKER_RANK, alpha=32.0))
        trained = {name: mx.array(w) for name, w in as_mlx(lora).items()}
        assert {name for name, _ in tree_flatten(model.trainable_parameters())} == set(trained)
        model.load_weights(list(trained.items()), strict=False)
        return MLXEngine(model, stop=[257])


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
    """The gradients as the server has them."""
    out = dict(grads)
    for group in SHARED:
        for name in [n for n in grads if n.endswith(f"{group[0]}.lora_a")]:
            members = [name.replace(group[0], other) for other in group]
            out |= dict.fromkeys(members, sum(grads[m] for m in members))
    return out


@pytest.fixture
def pair(tinker, tinker_server, tmp_path):
    folder = tmp_path / "adapters"
    folder.mkdir()
    return Pair(tinker(adam=PLAIN), folder, tinker_server.log.parent / "checkpoints", tinker_server.name)


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
    remote = {name: (w - as_mlx(after)[name]) * (PLAIN.eps / RATE) for name, w in as_mlx(before).items()}
    return remote, with_shared_a({name: np.array(g) for name, g in tree_flatten(grads)}), row


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
        assert len(found) == (14 if number == 0 else 28)  # A has no gradient while B is 0
        assert min(found.values()) > 0.999, name


@pytest.mark.slow
def test_a_server_that_averages_gives_the_gradient_of_the_sum_for_unequal_lengths_too(pair):
    remote, local, _ = both_gradients(pair, lambda engine: credited("grpo", engine, answers=(6, 2, 5, 1)))
    assert cosine(remote, local) > 0.999
    norms = [np.sqrt(sum((w.astype(np.float64) ** 2).sum() for w in g.values())) for g in (remote, local)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)


@pytest.mark.slow
def test_a_datum_shifted_by_one_is_found(pair, monkeypatch):
    right = pair.remote.data

    def unshifted(batch):
        return [replace(d, target_tokens=d.model_input) for d in right(batch)]

    monkeypatch.setattr(pair.remote, "data", unshifted)
    remote, local, row = both_gradients(pair, lambda engine: credited("grpo", engine))
    assert cosine(remote, local) < 0.9
    assert row["logprob_gap_mean"] > 0.5
