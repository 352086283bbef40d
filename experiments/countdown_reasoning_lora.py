"""Countdown with 13 trained numbers: a TinyLoRA, GTPO's weights by entropy and HICRA on planning tokens.

python experiments/countdown_reasoning_lora.py --steps 16 --output results/countdown_reasoning_lora
"""

import argparse
import json
from pathlib import Path
from statistics import mean

import textpolicy as tp  # before mlx, to which it gives a fast BLAS

# isort: split
import mlx.optimizers as optim

from textpolicy.algorithms.grams import get_countdown_strategic_grams
from textpolicy.config.adapters import TinyLoRA
from textpolicy.mlx.adapters.merging import attach, trainable
from textpolicy.rollout import RolloutRunner, create_strategy
from textpolicy.tasks.countdown import countdown_reward_with_info, generate_countdown_problems

WORKED = [({"target": 11, "numbers": [4, 7]}, "4 + 7"), ({"target": 24, "numbers": [8, 3]}, "8 * 3")]
SIZES = {"steps": 16, "num-problems": 60, "episodes-per-step": 128, "group-size": 8, "max-tokens": 12, "parameters": 13}


def chat(problem):
    """The question, after two that were asked and answered."""
    messages = []
    for p, answer in [*WORKED, (problem, "")]:
        question = f"Make {p['target']} from {' and '.join(map(str, p['numbers']))}."
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages[:-1]


def collect(model, tokenizer, problems, group_size, **sampling):
    """Episodes on the problems, group after group; their mean reward, and the share that is right."""
    how = {"examples": problems, "group_size": group_size, "max_tokens": sampling["max_tokens"], "tokenizer": tokenizer}
    env = tp.TextGenerationEnv([chat(p) for p in problems], countdown_reward_with_info, **how)
    policy, steps = tp.create_policy(model, tokenizer, sampling), len(problems) * group_size
    buffer = RolloutRunner(env, policy=policy, strategy=create_strategy("grpo"), max_steps=steps).collect()
    episodes = buffer.episodes
    return buffer, {"reward": mean(e.rew[0] for e in episodes), "correct": mean(e.is_correct[0] for e in episodes)}


def run(args):
    args.output.mkdir(parents=True)
    (args.output / "config.json").write_text(json.dumps(vars(args), default=str, indent=2) + "\n")
    model, tokenizer = tp.load_model(args.model)
    attach(model, TinyLoRA(u=args.parameters), args.seed)
    made = [w for w, _ in WORKED] + generate_countdown_problems(999, 2, (1, 12), (10, 99), seed=args.seed)
    distinct = list({(p["target"], *sorted(p["numbers"])): p for p in made}.values())[len(WORKED) :]
    train, test = distinct[: args.num_problems], distinct[args.num_problems :][: args.num_problems]
    shape = tp.build_gtpo_hicra_transform(tokenizer, strategic_grams=get_countdown_strategic_grams())
    trainer = tp.Trainer(
        model, tp.compute_advantages, tp.policy_loss, optim.Adam(args.lr), advantage_transform_fn=shape
    )
    sampling = {"max_tokens": args.max_tokens}
    _, before = collect(model, tokenizer, test, 4, **sampling, seed=2**20)
    groups, rows = args.episodes_per_step // args.group_size, []
    for step in range(args.steps):
        chosen = [train[(step * groups + i) % len(train)] for i in range(groups)]
        buffer, seen = collect(model, tokenizer, chosen, args.group_size, **sampling, seed=args.seed + step)
        rows.append({**seen, **trainer.train(buffer)})
        print(f"step {step + 1:3}  reward {seen['reward']:5.2f}  correct {seen['correct']:4.0%}", flush=True)
    _, after = collect(model, tokenizer, test, 4, **sampling, seed=2**20)
    tp.save_adapters(model, args.output / "adapter")
    (args.output / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print("learned:", [round(x, 3) for x in trainable(model)["adapter_vectors.v"].reshape(-1).tolist()])
    for name in before:
        print(f"{name} on {len(test)} held-out problems, 4 samples each: {before[name]:.2f} -> {after[name]:.2f}")


parser = argparse.ArgumentParser()
parser.add_argument("--model", default="smollm2-135m")
parser.add_argument("--output", type=Path, default=Path("results/countdown_reasoning_lora"))
parser.add_argument("--lr", type=float, default=TinyLoRA.learning_rate)
for name, default in {**SIZES, "seed": 42}.items():
    parser.add_argument(f"--{name}", type=int, default=default)
run(parser.parse_args())
