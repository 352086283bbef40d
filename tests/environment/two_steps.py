"""Two steps of training, as every kind of environment has to allow them."""

from textpolicy.algorithms import algorithm
from textpolicy.engine import Sampling
from textpolicy.loop.on_policy import OnPolicyCheck
from textpolicy.loop.train import Schedule, train


def two_steps(engine, env, max_tokens, group_size=4):
    """(row, episodes) of each; the on-policy check stops a run whose tokens are not those that it scores."""
    steps = []
    train(
        engine,
        env,
        algorithm("grpo"),
        schedule=Schedule(1e-4, steps=2),
        prompts_per_step=2,
        group_size=group_size,
        sampling=Sampling(max_tokens=max_tokens, seed=1),
        check=OnPolicyCheck(every=1, completions=8, max_gap=1e-3),
        on_step=lambda step, row, episodes: steps.append((row, episodes)),
    )
    assert [row["step"] for row, _ in steps] == [0, 1]
    assert all(len(episodes) == 2 * group_size for _, episodes in steps)
    assert all(row["on_policy_gap_mean"] < 1e-4 for row, _ in steps)
    return steps
