"""Train a few steps of countdown with a calculator as a tool, called before the answer, and print an episode."""

import argparse
from statistics import mean

import textpolicy as tp
from textpolicy.algorithms import algorithm
from textpolicy.engine import Sampling
from textpolicy.environment import ToolCall, ToolEnv
from textpolicy.loop.evaluation import evaluate
from textpolicy.loop.train import Schedule, train
from textpolicy.mlx.adapters.merging import attach_lora
from textpolicy.mlx.engine import MLXEngine
from textpolicy.tasks.countdown import countdown_reward_with_info, generate_countdown_problems
from textpolicy.tasks.countdown_game import calculate  # (expression: str) -> str, exact


def question(problem):
    return {"role": "user", "content": f"Make {problem['target']} from {' and '.join(map(str, problem['numbers']))}."}


def worked(problem, expression):
    """The messages of a problem solved with one call, as an example; short, because the model is small."""
    spoken = [f"calculate {expression}", str(problem["target"]), expression]
    roles = ["assistant", "tool", "assistant"]
    return [question(problem), *({"role": r, "content": c} for r, c in zip(roles, spoken, strict=True))]


SHOWN = [*worked({"target": 11, "numbers": [4, 7]}, "4 + 7"), *worked({"target": 24, "numbers": [8, 3]}, "8 * 3")]


def parse(text):
    """Read "calculate 4 + 7" as a call; without ``parse``, calls are JSON in <tool_call> tags."""
    called = text.startswith("calculate ")
    return [ToolCall("calculate", {"expression": text.removeprefix("calculate ")})] if called else []


def reward(prompt, completion, example, messages, **kwargs):
    """Return 1 for the right expression after a successful calculation, and 0.7 without one."""
    scored = countdown_reward_with_info(prompt, completion, example, invalid=0.0)
    results = [m["content"] for m in messages[len(SHOWN) :] if m["role"] == "tool"]
    used = any(not text.startswith("Error") for text in results)
    return {"reward": scored["reward"] * (1.0 if used else 0.7), "is_correct": scored["is_correct"]}


def environment(problems, tokenizer):
    prompts, settings = [[*SHOWN, question(p)] for p in problems], {"parse": parse, "describe": lambda schemas: ""}
    return ToolEnv(prompts, [calculate], reward, 16, tokenizer=tokenizer, examples=problems, max_turns=3, **settings)


def report(when, engine, env):
    episodes = evaluate(engine, env, Sampling(16, temperature=0.0)).episodes
    right, asked = (
        mean(values) for values in ([e.is_correct for e in episodes], ["[tool]" in e.text for e in episodes])
    )
    print(f"{when} training: {right:.0%} of {len(episodes)} held-out problems right, calculator asked in {asked:.0%}")
    return episodes


def main(steps, prompts, test):
    model, tokenizer = tp.load_model("smollm2-135m")
    engine = MLXEngine(attach_lora(model, rank=16), stop=tokenizer.eos_token_ids)
    problems = generate_countdown_problems(200 + test, 2, (1, 12), (2, 99), seed=0)
    held_out, training = environment(problems[:test], tokenizer), environment(problems[test:], tokenizer)
    report("before", engine, held_out)
    settings = {"schedule": Schedule(3e-4, steps, final=0.1), "prompts_per_step": prompts, "group_size": 8}
    train(engine, training, algorithm("grpo"), **settings, sampling=Sampling(16, seed=1), on_step=show_step)
    print(report("after", engine, held_out)[0].text)


def show_step(step, row, episodes):
    print(f"step {step + 1:2}  reward {row['reward_mean']:.2f}  correct {row['accuracy']:.0%}", flush=True)


parser = argparse.ArgumentParser()
for name, default in {"steps": 12, "prompts": 8, "test": 24}.items():
    parser.add_argument(f"--{name}", type=int, default=default)
main(**vars(parser.parse_args()))
