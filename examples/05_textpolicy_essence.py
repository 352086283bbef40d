"""The four hops of every step, with nothing hidden: sample, score, credit, update."""

import textpolicy as tp
from textpolicy.algorithms import algorithm
from textpolicy.engine import Sampling
from textpolicy.loop.collect import collect
from textpolicy.mlx.adapters.merging import attach_lora
from textpolicy.mlx.engine import MLXEngine


@tp.reward
def three_words(prompt: str, completion: str, example: dict, **kwargs) -> float:
    """Return 1 for three words, less for more or fewer."""
    return 1 / (1 + abs(len(completion.split()) - 3))


def main() -> None:
    model, tokenizer = tp.load_model("smollm2-135m")
    engine = MLXEngine(attach_lora(model, rank=8), stop=tokenizer.eos_token_ids)
    env = tp.TextGenerationEnv(["Name a colour.", "Name a fruit."], three_words, max_tokens=12, tokenizer=tokenizer)

    episodes = collect(engine, env, prompts=[0, 1], group_size=4, sampling=Sampling(max_tokens=12, seed=1))
    for e in episodes:
        print(f"group {e.group}  reward {e.reward:.2f}  {e.text!r}")

    recipe = algorithm("grpo")  # an advantage is the reward minus the mean of its group, divided by the group's spread
    [batch] = recipe.mini_batches(episodes, 1, recipe.controller())
    credit = [float(row[mask][0]) for row, mask in zip(batch.advantages, batch.weights != 0, strict=True)]
    print("credit of each completion:", " ".join(f"{a:+.2f}" for a in credit))

    before = engine.score(batch)
    metrics = engine.update(batch, recipe.surrogate, learning_rate=1e-4)
    change = [float(row.sum()) for row in engine.score(batch) - before]
    print(f"one update: gradient {metrics['grad_norm']:.2f}; what it did to each completion's log-prob:")
    print(" ".join(f"{c:+.2f}" for c in change))
    better = sum(c * a for c, a in zip(change, credit, strict=True)) > 0
    print("what was better than its group became likelier:", "yes" if better else "no")


if __name__ == "__main__":
    main()
