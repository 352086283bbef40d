"""Learning from demonstrations: the loss of mlx-lm, its gradient, and steps that go through all rows."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import default_loss

from textpolicy.errors import UserError
from textpolicy.loop.teach import IMITATION, held_out_loss, imitated, teach
from textpolicy.loop.train import Schedule
from textpolicy.mlx.engine import PolicyObjective
from textpolicy.types import Completion, Episode


@pytest.fixture
def rows():
    """Conversations of one turn each, of different lengths."""
    rng = np.random.default_rng(1)
    made = []
    for asked, said in ((3, 4), (5, 2), (2, 9), (3, 1)):
        tokens = rng.integers(1, 11, asked + said)
        turn = Completion(tokens[asked:].astype(np.int32), np.zeros(said, np.float32))
        made.append(Episode.from_completion(tokens[:asked], turn, reward=np.nan, group=len(made)))
    return made


def of_mlx_lm(model, rows):
    """mlx-lm's loss of each row, alone and unpadded, with its number of tokens."""
    pairs = []
    for e in rows:
        lengths = mx.array([[int(np.argmax(e.mask)), len(e.tokens)]])
        loss, count = default_loss(model, mx.array(e.tokens[None]), lengths)
        pairs.append((loss, count))
    return sum(loss * count for loss, count in pairs) / sum(count for _, count in pairs)


def test_the_loss_and_its_gradient_are_those_of_mlx_lm(tiny_engine, rows):
    stats, gradients = tiny_engine.gradients(imitated(rows), PolicyObjective(IMITATION))
    loss, gradient = nn.value_and_grad(tiny_engine.model, lambda model: of_mlx_lm(model, rows))(tiny_engine.model)
    assert stats["loss"] == pytest.approx(loss.item(), abs=1e-6)
    assert held_out_loss(tiny_engine, rows) == pytest.approx(loss.item(), abs=1e-6)
    expected = dict(tree_flatten(gradient))
    found = dict(tree_flatten(gradients))
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        theirs = np.array(expected[name])
        assert np.linalg.norm(np.array(gradient) - theirs) <= 1e-4 * np.linalg.norm(theirs), name


@pytest.mark.parametrize("tokens", [10, 20, 10_000])
def test_rows_packed_into_any_micro_batches_have_one_loss(tiny_engine, rows, tokens):
    expected, _ = tiny_engine.gradients(imitated(rows), PolicyObjective(IMITATION))
    tiny_engine.micro_batch_tokens = tokens
    found, _ = tiny_engine.gradients(imitated(rows), PolicyObjective(IMITATION))
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6)


def test_steps_go_through_all_rows_and_lower_the_loss(tiny_engine, rows):
    seen = []
    before = held_out_loss(tiny_engine, rows)
    teach(
        tiny_engine, rows, schedule=Schedule(0.01, 12, first=3), rows_per_step=2,
        on_step=lambda step, row, episodes: seen.append((step, row, episodes)),
    )  # fmt: skip
    assert [step for step, _, _ in seen] == [*range(3, 15)]
    assert not any(episodes for _, _, episodes in seen)
    counts = [int(e.mask.sum()) for e in rows]
    assert sum(row["learned_tokens"] for _, row, _ in seen[:2]) == sum(counts)  # an epoch
    assert held_out_loss(tiny_engine, rows) < before - 0.5


def test_more_updates_than_demonstrations_are_refused(tiny_engine, rows):
    with pytest.raises(UserError, match=r"updates_per_step is 5 and there are 4 demonstrations"):
        teach(tiny_engine, rows, schedule=Schedule(0.01, 1, updates=5), rows_per_step=8)
