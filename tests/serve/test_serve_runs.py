"""The viewer and every reader of run folders open what a server's clients trained."""

import numpy as np
import pytest
from asking import Asking, a_pass
from served import TOKEN, Served

from textpolicy.record.reader import load_run
from textpolicy.report.view.server import make_app


@pytest.fixture
def ask(server):
    return Asking(server.url)


def test_a_training_client_has_a_run_folder_with_its_losses_and_what_it_learned_from(ask, server):
    _, model = ask.model(seed=1)
    prompt, answers = [1, 2, 3], [[4, 5], [6, 0]]
    data = []
    for answer, advantage in zip(answers, (0.5, -0.5), strict=True):
        tokens = [*prompt, *answer]
        own = np.arange(len(tokens) - 1) >= len(prompt) - 1
        inputs = {"target_tokens": tokens[1:], "logprobs": -1.5 * own, "advantages": advantage * own}
        data.append((tokens[:-1], inputs))
    for seq in (1, 4):  # two passes before each step
        ask("forward_backward", a_pass(model, seq, data, "importance_sampling"))
        ask("forward_backward", a_pass(model, seq + 1, data[:1], "importance_sampling"))
        ask.result(ask.step(model, seq + 2)[1]["request_id"])
    [folder] = (server.service.folder / "runs").iterdir()
    run = load_run(folder)
    assert run.config["served"]["id"] == model
    assert [(row["step"], row["passes"], row["sequences"]) for row in run.rows] == [(0, 2, 3), (1, 2, 3)]
    assert np.isfinite([row["loss"] for row in run.rows]).all()
    first = run.rollouts.to_pylist()[:3]
    assert [row["tokens"] for row in first] == [*answers, answers[0]]
    assert [row["advantage"] for row in first] == [0.5, -0.5, 0.5]
    assert {row["prompt"] for row in first} == {"abc"}
    assert [row["reward"] for row in first] == [None] * 3
    np.testing.assert_allclose(first[0]["logprobs"], [-1.5, -1.5])
    with Served(make_app([server.service.folder / "runs"], TOKEN)) as pages:
        assert "abc" in pages.page()
