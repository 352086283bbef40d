"""Train through OpenPipe's ART, unmodified, against ``textpolicy serve`` on this machine: one JSON row per run.

    python -m venv ART  # with what benchmarks/tinker_cookbook.py names, and
    ART/bin/pip install openpipe-art datrie openai==2.24.0  # ART hands a newer one a time limit of the wrong kind
    .venv/bin/python benchmarks/tinker_art.py --python ART/bin/python [--steps 6]

ART's own extra pins tinker 0.18, which the server refuses; its native backend works with 0.38. Each step samples 4
questions x 8 answers through ART's own endpoint, which asks the server's sampler, and trains on them; short answers get
a higher reward. At the end the trained sampler answers on the server's /v1, too. Rows are appended to
benchmarks/results/tinker_art.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

QUESTIONS = ("Name a colour.", "What is the capital of France?", "Name an animal.", "What is 3 + 4?")
RESULTS = Path(__file__).parent / "results" / "tinker_art.jsonl"
LONGEST = 24  # tokens of an answer


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", type=Path, help="of the environment with ART")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--inside", help="the model's folder, in ART's environment")
    asked = parser.parse_args()
    if asked.inside:
        print(json.dumps(asyncio.run(train(asked.inside, asked.steps))))
        return
    from machine import describe
    from tinker_cookbook import server, without_python

    from textpolicy.cli.tinker_server import served_model

    model, started = served_model(asked.model), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, server(model, Path(folder), None) as url:
        given = {"TINKER_BASE_URL": url, "TINKER_API_KEY": "tml-local", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
        done = subprocess.run(
            [asked.python, "-P", Path(__file__).resolve(), "--inside", model, "--steps", str(asked.steps)],
            cwd=folder,
            env={**without_python(), **given, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
    found = json.loads(done.stdout.strip().splitlines()[-1])
    row = {"benchmark": "tinker_art", "steps": asked.steps, **found, "seconds": time.perf_counter() - started}
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**row, **describe()}) + "\n")
    print(row)


async def train(folder: str, steps: int) -> dict[str, Any]:
    """Return the mean reward of each step, and what the server's /v1 says with the last sampler."""
    from importlib.metadata import version

    import art
    from art.tinker_native import TinkerNativeBackend
    from openai import AsyncOpenAI

    arguments: Any = {"renderer_name": "qwen3_instruct", "training_client_args": {"rank": 16}}
    model: Any = art.TrainableModel(
        name="short", project="art", base_model=folder, _internal_config={"tinker_native_args": arguments}
    )
    backend = TinkerNativeBackend(path="art")
    await model.register(backend)

    async def answer(question: str) -> Any:
        messages: Any = [{"role": "user", "content": question}]
        reply = await model.openai_client().chat.completions.create(
            model=model.get_inference_name(), messages=messages, max_completion_tokens=LONGEST, logprobs=True
        )
        choice = reply.choices[0]
        reward = 1 - len(choice.logprobs.content) / LONGEST
        return art.Trajectory(messages_and_choices=[*messages, choice], reward=reward)

    rewards, learned = [], []
    for _ in range(steps):
        groups = await art.gather_trajectory_groups(
            [art.TrajectoryGroup(answer(question) for _ in range(8)) for question in QUESTIONS]
        )
        answers = [answer for group in groups for answer in group.trajectories]
        rewards.append(sum(answer.reward for answer in answers) / len(answers))
        result = await backend.train(model, groups, learning_rate=1e-3, loss_fn="importance_sampling")
        learned.append(result.metrics.get("data/step_num_datums"))
    sampler = backend._model_state["short"].sampler_checkpoint_paths[steps]
    own = AsyncOpenAI(base_url=os.environ["TINKER_BASE_URL"] + "/v1", api_key="tml-local")
    said = await own.chat.completions.create(
        model=sampler,
        messages=[{"role": "user", "content": QUESTIONS[1]}],
        max_completion_tokens=LONGEST,
        logprobs=True,
    )
    await backend.close()
    return {
        "rewards": rewards,
        "datums": learned,
        "said": said.choices[0].message.content,
        "said_tokens": len(said.choices[0].logprobs.content),
        "art": version("openpipe-art"),
        "tinker": version("tinker"),
    }


if __name__ == "__main__":
    main()
