"""The plain framework: mlx-lm's batch decoding, then one forward, backward and AdamW step on the same tokens.

A floor for a loop that adds nothing to mlx and mlx-lm, and shares nothing between the rows of a group.
"""

from __future__ import annotations

from typing import Any

from worker import Gate, Task, load_openblas, reward_of

load_openblas()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
import mlx_lm  # noqa: E402
import numpy as np  # noqa: E402
from mlx.utils import tree_map  # noqa: E402
from mlx_lm.generate import BatchGenerator  # noqa: E402
from mlx_lm.sample_utils import make_sampler  # noqa: E402
from mlx_model import attach_lora, weights_sum  # noqa: E402


def main() -> None:
    task, gate = Task.from_command_line(), Gate()
    model, tokenizer = mlx_lm.load(task.model)
    attach_lora(model, task)
    optimizer = optim.AdamW(task.learning_rate, weight_decay=0.0)
    compute = nn.value_and_grad(model, loss)
    prompts = [list(ids) for ids in task.prompt_ids for _ in range(task.group)]
    gate.watch(weights_sum(model), mx.get_peak_memory if task.on_gpu else None)
    while True:
        gate.step()
        with gate.timed("rollout"):
            completions = decode(model, prompts, task.new_tokens)
        gate.generated(map(len, prompts), map(len, completions))
        advantages = centred([reward_of(tokenizer.decode(c)) for c in completions], task.group)
        rows = mx.array([p + c for p, c in zip(prompts, completions, strict=True)])
        summed, at_once = None, task.at_once
        if task.on_gpu:  # with all of them MLX has no memory left for its CUDA graphs beside a peak of 116 GB
            at_once = max(1, at_once // 2)
        for begin in range(0, len(rows), at_once):
            part = slice(begin, begin + at_once)
            _, gradients = compute(model, rows[part], advantages[part], len(prompts[0]))
            summed = gradients if summed is None else tree_map(mx.add, summed, gradients)
            mx.eval(summed)
        optimizer.update(model, summed)
        mx.eval(model.parameters(), optimizer.state)


def decode(model: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    model.eval()
    rows = len(prompts)
    generator = BatchGenerator(
        model, stop_tokens=[], sampler=make_sampler(1.0), completion_batch_size=rows, prefill_batch_size=rows
    )
    places = generator.insert(prompts, [new_tokens] * rows)
    tokens: dict[int, list[int]] = {place: [] for place in places}
    while responses := generator.next_generated():
        for response in responses:
            tokens[response.uid].append(response.token)
    generator.close()
    model.train()
    return [tokens[place] for place in places]


def centred(rewards: list[float], group: int) -> mx.array:
    """(B,) rewards less the mean of their group."""
    r = np.array(rewards, np.float32).reshape(-1, group)
    return mx.array((r - r.mean(axis=1, keepdims=True)).reshape(-1))


def loss(model: Any, rows: mx.array, advantages: mx.array, prompt_tokens: int) -> mx.array:
    """Policy gradient on (B, P + T) ``rows``: the mean over the T sampled tokens of -A log p."""
    logits = model(rows[:, :-1])[:, prompt_tokens - 1 :]
    nll = nn.losses.cross_entropy(logits, rows[:, prompt_tokens:])
    return (nll * advantages[:, None]).mean()


if __name__ == "__main__":
    main()
