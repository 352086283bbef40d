"""Write your own algorithm: an advantage and a stage, each a small dataclass, in a recipe for a real run.

python examples/14_own_algorithm.py
"""

import argparse
from dataclasses import dataclass, replace
from statistics import mean

import numpy as np

import textpolicy as tp
from textpolicy.algorithms import Algorithm, Credit, Rewards
from textpolicy.engine import Sampling
from textpolicy.loop.evaluation import evaluate
from textpolicy.loop.train import Schedule, train
from textpolicy.mlx.adapters.merging import attach_lora
from textpolicy.mlx.engine import MLXEngine
from textpolicy.tasks import load_task


@dataclass(frozen=True)
class Ranked:
    """The baseline A_i = rank of r_i in its group, from -1 (worst) to 1 (best); ties get their mean rank."""

    def __call__(self, rewards: Rewards) -> np.ndarray:  # (B,)
        r, same = rewards.value, rewards.group[:, None] == rewards.group
        beaten = (same & (r[:, None] > r)).sum(1) - (same & (r[:, None] < r)).sum(1)
        return beaten / np.maximum(rewards.count - 1, 1)


@dataclass(frozen=True)
class EarlyTokens:
    """The stage A_t <- decay^t A_t: the beginning decides an answer."""

    decay: float = 0.9

    def __call__(self, credit: Credit) -> Credit:
        return replace(credit, advantage=credit.advantage * self.decay**credit.position)


MINE = Algorithm(Ranked(), stages=(EarlyTokens(),), aggregation="seq-mean-token-mean", summary="ranks, early tokens")


def main(steps, prompts, test):
    print("ranks of the rewards 1, 0.1, 0.1, 0:", Ranked()(Rewards.of([1, 0.1, 0.1, 0])).round(2).tolist())
    task = load_task("largest")
    model, tokenizer = tp.load_model("smollm2-135m")
    engine = MLXEngine(attach_lora(model, rank=16), stop=tokenizer.eos_token_ids)

    def environment(problems):
        asked, known = [task.prompt(p.question) for p in problems], [p.example for p in problems]
        return tp.TextGenerationEnv(asked, task.reward, 8, tokenizer=tokenizer, examples=known)

    held_out, seen = environment(task.test[:test]), []

    def show_step(step, row, episodes):
        seen.append(row["reward_mean"])
        print(f"step {step + 1:2}  reward {row['reward_mean']:.2f}  correct {row['accuracy']:.0%}", flush=True)

    print("before:", evaluate(engine, held_out, Sampling(8, temperature=0.0)).accuracy)
    settings = {"schedule": Schedule(3e-4, steps, final=0.1), "prompts_per_step": prompts, "group_size": 8}
    train(engine, environment(task.train), MINE, **settings, sampling=Sampling(8, seed=0), on_step=show_step)
    print("after:", evaluate(engine, held_out, Sampling(8, temperature=0.0)).accuracy)
    third = max(steps // 3, 1)
    print(f"reward of the first steps {mean(seen[:third]):.2f}, of the last ones {mean(seen[-third:]):.2f}")


parser = argparse.ArgumentParser()
for name, default in {"steps": 15, "prompts": 8, "test": 40}.items():
    parser.add_argument(f"--{name}", type=int, default=default)
main(**vars(parser.parse_args()))
