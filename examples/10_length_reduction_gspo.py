"""Make answers shorter with GSPO and keep them right: the more words around the capital, the lower the reward.

GSPO has one ratio for a whole completion, clipped to a narrow band, which matters when a step makes several updates.

python examples/10_length_reduction_gspo.py

On a Linux CPU it printed (the same seeds may draw other words elsewhere):
before: 30.9 tokens on average, right 28.1% [12.3%, 52.1%]
after: 9.1 tokens on average, right 68.8% [39.8%, 88.0%]
"""

import argparse
from statistics import mean

import textpolicy as tp
from textpolicy.algorithms import algorithm
from textpolicy.engine import Sampling
from textpolicy.loop.evaluation import evaluate
from textpolicy.loop.train import Schedule, train
from textpolicy.mlx.adapters.merging import attach_lora
from textpolicy.mlx.engine import MLXEngine

CAPITALS = (
    "France Paris,Italy Rome,Spain Madrid,Egypt Cairo,Kenya Nairobi,Canada Ottawa,Norway Oslo,China Beijing,"
    "Russia Moscow,Cuba Havana,Ireland Dublin,Austria Vienna,Poland Warsaw,Turkey Ankara,India Delhi,Iran Tehran,"
    "Sweden Stockholm,Finland Helsinki,Hungary Budapest,Chile Santiago,Iraq Baghdad,Nepal Kathmandu,Ghana Accra,"
    "Vietnam Hanoi,Germany Berlin,Portugal Lisbon,Peru Lima,Japan Tokyo,Greece Athens,Denmark Copenhagen,"
    "Thailand Bangkok,Ukraine Kyiv"
)
LONGEST = 40  # tokens


def brief(prompt, completion, example, truncated=False, **kwargs):
    """Return 1 for the capital in at most three words, less for each further word, 0 without it or if cut off."""
    right = example["answer"] in completion
    return {"reward": min(1.0, 3 / len(completion.split())) if right and not truncated else 0.0, "is_correct": right}


def environment(pairs, tokenizer):
    questions = [f"What is the capital of {pair.split()[0]}?" for pair in pairs]
    examples = [{"answer": pair.split()[1]} for pair in pairs]
    return tp.TextGenerationEnv(questions, brief, LONGEST, tokenizer=tokenizer, examples=examples)


def report(when, engine, env):
    """Evaluate with the same draws before and after: temperature 1, as in training, on held-out countries."""
    answered = evaluate(engine, env, Sampling(LONGEST, seed=7), samples=4)
    length = mean(int(e.mask.sum()) for e in answered.episodes)
    print(f"{when}: {length:.1f} tokens on average, right {answered.average}")
    for e in answered.episodes[::4][:3]:
        print(f"   {e.text!r}", flush=True)
    return length


def show_step(step, row, episodes):
    clipped = row.get("clip_fraction_low", 0) + row.get("clip_fraction_high", 0)
    shown = f"reward {row['reward_mean']:.2f}  correct {row['accuracy']:4.0%}  length {row['length_mean']:4.1f}"
    print(f"step {step + 1:2}  {shown}  clipped {clipped:.0%}", flush=True)


def main(steps, prompts, test):
    model, tokenizer = tp.load_model("smollm2-135m")
    engine = MLXEngine(attach_lora(model, rank=16), stop=tokenizer.eos_token_ids)
    pairs = CAPITALS.split(",")
    held_out, training = environment(pairs[-test:], tokenizer), environment(pairs[:-8], tokenizer)
    before = report("before", engine, held_out)
    settings = {"schedule": Schedule(3e-4, steps, final=0.1, updates=2), "prompts_per_step": prompts, "group_size": 8}
    sampling = Sampling(LONGEST, seed=1)
    train(engine, training, algorithm("gspo"), **settings, sampling=sampling, on_step=show_step)
    after = report("after", engine, held_out)
    print(f"mean length on {test} held-out questions: {before:.1f} -> {after:.1f} tokens")


parser = argparse.ArgumentParser()
for name, default in {"steps": 12, "prompts": 6, "test": 8}.items():
    parser.add_argument(f"--{name}", type=int, default=default)
main(**vars(parser.parse_args()))
