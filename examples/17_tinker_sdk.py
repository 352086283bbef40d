"""Train through the Tinker SDK, on this machine or on remote GPUs: only the address differs.

python examples/17_tinker_sdk.py --serve                       on a server that it starts here: textpolicy serve
TINKER_BASE_URL=http://127.0.0.1:8000 TINKER_API_KEY=tml-local python examples/17_tinker_sdk.py       on one that runs
python examples/17_tinker_sdk.py --model Qwen/Qwen3-4B-Instruct-2507            on the hosted service, with its key
"""

import argparse
import random
import subprocess
import sys
import tempfile

import numpy as np
import tinker


def problem(rng):
    """Return a question and its answer."""
    numbers = [rng.randrange(10, 100) for _ in range(3)]
    shown = f"Q: What is the largest of 12, 57, 31?\nA: 57\nQ: What is the largest of {str(numbers)[1:-1]}?\nA:"
    return shown, max(numbers)


def train(args, **where):
    """Sample answers, reward those that are right, and step, at TINKER_BASE_URL or on the hosted service by default."""
    service = tinker.ServiceClient(**where)
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
        passed = client.forward_backward(data, "importance_sampling")
        client.optim_step(tinker.AdamParams(learning_rate=1e-3)).result()
        loss = passed.result().metrics["loss:sum"]
        print(f"step {step + 1}  right {np.mean(rewards):.0%}  loss {loss:.2f}", flush=True)
    print("saved:", client.save_state("largest").result().path)
    service.close("success").result()


def datum(prompt, sequence, advantage):
    """Return one completion as what importance_sampling learns from: nothing of the prompt, all of the answer."""
    tokens, before = [*prompt, *sequence.tokens], [0.0] * (len(prompt) - 1)
    of_each = {"logprobs": sequence.logprobs, "advantages": [advantage] * len(sequence.tokens)}
    inputs = {name: np.array([*before, *values], np.float32) for name, values in of_each.items()}
    inputs["target_tokens"] = np.array(tokens[1:])
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def served(args):
    """Train on a server of this machine, which ends with the program."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "textpolicy", "serve", args.model, "--port=0", f"--folder={folder}/serve"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            url = next(line for line in server.stdout if line.startswith("serving")).partition(" at ")[2].split(";")[0]
            train(args, base_url=url, api_key="tml-local")
            server.terminate()


parser = argparse.ArgumentParser()
parser.add_argument("--serve", action="store_true")
parser.add_argument("--model", default="smollm2-135m")
for name, default in {"steps": 20, "prompts": 8, "group": 8}.items():
    parser.add_argument(f"--{name}", type=int, default=default)
args = parser.parse_args()
served(args) if args.serve else train(args)
