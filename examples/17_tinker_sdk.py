"""Train through the Tinker SDK, on this machine or on remote GPUs: only the address differs.

python examples/17_tinker_sdk.py --serve                       on a server that it starts here: textpolicy serve
TINKER_BASE_URL=http://127.0.0.1:8000 python examples/17_tinker_sdk.py          on one that runs already
python examples/17_tinker_sdk.py --model Qwen/Qwen3-4B-Instruct-2507            on the hosted service, with its key
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
from contextlib import contextmanager

import numpy as np
import tinker


def problem(rng):
    """Return a question and its answer."""
    numbers = [rng.randrange(10, 100) for _ in range(3)]
    return f"Q: What is the largest of 12, 57, 31?\nA: 57\nQ: What is the largest of {str(numbers)[1:-1]}?\nA:", max(
        numbers
    )


def train(service, args):
    """Sample answers, reward those that are right, and step; nothing here knows where the model is."""
    client = service.create_lora_training_client(args.model, rank=16, seed=0).result()
    tokenizer, rng = client.get_tokenizer(), random.Random(0)
    for step in range(args.steps):
        sampler = client.save_weights_and_get_sampling_client().result()
        how = tinker.SamplingParams(max_tokens=6, stop=["\n"], seed=step)
        asked = [problem(rng) for _ in range(args.prompts)]
        prompts = [tokenizer.encode(question) for question, _ in asked]
        pending = [sampler.sample(tinker.ModelInput.from_ints(p), args.group, how) for p in prompts]
        data, rewards = [], []
        for prompt, (_, answer), future in zip(prompts, asked, pending, strict=True):
            sequences = future.result().sequences
            scores = [float(tokenizer.decode(s.tokens).strip().startswith(str(answer))) for s in sequences]
            rewards += scores
            data += [datum(prompt, s, score - np.mean(scores)) for s, score in zip(sequences, scores, strict=True)]
        learned = [d for d in data if any(d.loss_fn_inputs["advantages"].to_numpy())]
        if learned:
            passed = client.forward_backward(learned, "importance_sampling")
            client.optim_step(tinker.AdamParams(learning_rate=1e-3)).result()
            loss = passed.result().metrics["loss:sum"]
        print(f"step {step + 1}  right {np.mean(rewards):.0%}  loss {loss if learned else 0:.2f}", flush=True)
    print("saved:", client.save_state("largest").result().path)


def datum(prompt, sequence, advantage):
    """Return one completion as what importance_sampling learns from: nothing of the prompt, all of the answer."""
    tokens, before = [*prompt, *sequence.tokens], [0.0] * (len(prompt) - 1)
    inputs = {
        "target_tokens": np.array(tokens[1:]),
        "logprobs": np.array([*before, *sequence.logprobs], np.float32),
        "advantages": np.array([*before, *[advantage] * len(sequence.tokens)], np.float32),
    }
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


@contextmanager
def served(model):
    """Yield the address of a server of this machine, which ends with the ``with``."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "textpolicy", "serve", model, "--port=0", f"--folder={folder}/serve"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            yield next(line for line in server.stdout if line.startswith("serving")).partition(" at ")[2].split(";")[0]
            server.terminate()


def main():
    """Train where the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", action="store_true", help="start a server here")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    args = parser.parse_args()
    if args.serve:
        with served(args.model) as url:
            service = tinker.ServiceClient(base_url=url, api_key="tml-local")
            train(service, args)
            service.close("success").result()
    else:
        if os.environ.get("TINKER_BASE_URL", "").startswith("http://127.0.0.1"):
            os.environ.setdefault("TINKER_API_KEY", "tml-local")
        service = tinker.ServiceClient()
        train(service, args)
        service.close("success").result()


if __name__ == "__main__":
    main()
