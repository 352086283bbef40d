"""Make answers shorter with GRPO: a rambling model learns to describe a thing in one short sentence.

python examples/09_length_reduction_grpo.py

On a Linux CPU it printed (the same seeds may draw other words elsewhere):
mean length on 8 held-out questions: 38.5 -> 9.6 tokens
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

THINGS = (
    "cat river clock violin bridge apple doctor desert engine candle library planet bicycle teacher "
    "mirror winter hammer garden island letter museum rocket farmer window piano forest baker ocean "
    "camera castle ticket spider market dragon pencil ladder"
)
HELD_OUT = "horse kitchen mountain lamp painter train feather school"
LONGEST = 48  # tokens


def brief(prompt, completion, example, truncated=False, **kwargs):
    """Return 1 for a finished answer of four to six words, less for each further word, and 0 otherwise.

    The thing is to be named once: without that rule the model soon says "A horse is a horse".
    """
    words = len(completion.split())
    named_once = completion.lower().count(example["thing"]) == 1
    return min(1.0, 6 / words) if named_once and words >= 4 and not truncated else 0.0


def environment(things, tokenizer):
    questions, examples = [f"What is a {t}? Answer briefly." for t in things], [{"thing": t} for t in things]
    return tp.TextGenerationEnv(questions, brief, LONGEST, tokenizer=tokenizer, examples=examples)


def report(when, engine, env):
    """Evaluate with the same draws before and after: temperature 1, as in training, on held-out things."""
    episodes = evaluate(engine, env, Sampling(LONGEST, seed=7), samples=4).episodes
    length = mean(int(e.mask.sum()) for e in episodes)
    print(f"{when}: {length:.1f} tokens on average, {mean(e.truncated for e in episodes):.0%} cut off at {LONGEST}")
    for e in episodes[::4][:3]:
        print(f"   {e.text!r}", flush=True)
    return length


def show_step(step, row, episodes):
    print(f"step {step + 1:2}  reward {row['reward_mean']:.2f}  length {row['length_mean']:4.1f}", flush=True)


def main(steps, prompts, test):
    model, tokenizer = tp.load_model("smollm2-135m")
    engine = MLXEngine(attach_lora(model, rank=16), stop=tokenizer.eos_token_ids)
    held_out = environment(HELD_OUT.split()[:test], tokenizer)
    before = report("before", engine, held_out)
    settings = {"schedule": Schedule(5e-4, steps, final=0.1), "prompts_per_step": prompts, "group_size": 8}
    train(
        engine,
        environment(THINGS.split(), tokenizer),
        algorithm("grpo"),
        **settings,
        sampling=Sampling(LONGEST, seed=1),
        on_step=show_step,
    )
    after = report("after", engine, held_out)
    print(f"mean length on {test} held-out questions: {before:.1f} -> {after:.1f} tokens")


parser = argparse.ArgumentParser()
for name, default in {"steps": 12, "prompts": 6, "test": 8}.items():
    parser.add_argument(f"--{name}", type=int, default=default)
main(**vars(parser.parse_args()))
