"""Train one script on two engines: the largest of five numbers, on this machine or on a Tinker server.

python examples/15_tinker.py                                     on this machine, with MLX
python examples/15_tinker.py --engine tinker --serve             on a Tinker server that it starts here
python examples/15_tinker.py --engine tinker --model Qwen/Qwen3-4B-Instruct-2507      on the hosted service
"""

import argparse
import subprocess
import sys
import tempfile

import textpolicy as tp
from textpolicy.algorithms import algorithm
from textpolicy.engine import Sampling
from textpolicy.loop.evaluation import evaluate
from textpolicy.loop.train import Schedule, train
from textpolicy.tasks import load_task


def here(model):
    """Return an engine in this process, and its tokenizer."""
    from textpolicy.mlx.adapters.merging import attach_lora
    from textpolicy.mlx.engine import MLXEngine

    model, tokenizer = tp.load_model(model)
    return MLXEngine(attach_lora(model, rank=16), stop=tokenizer.eos_token_ids), tokenizer


def there(model, url=None):
    """Return an engine on the Tinker server at ``url``, else at TINKER_BASE_URL, else on the hosted service."""
    from textpolicy.tinker.engine import TinkerEngine

    engine = TinkerEngine.connect(model, rank=16, base_url=url)
    return engine, engine.tokenizer


def run(engine, tokenizer, args):
    """Train and evaluate; nothing here depends on where the model is."""
    task = load_task("largest")

    def environment(problems):
        prompts, examples = [task.prompt(p.question) for p in problems], [p.example for p in problems]
        return tp.TextGenerationEnv(prompts, task.reward, 8, tokenizer=tokenizer, examples=examples)

    held_out = environment(task.test[: args.test])
    print("before:", evaluate(engine, held_out, Sampling(8, temperature=0.0)).accuracy)
    train(
        engine,
        environment(task.train),
        algorithm("grpo"),
        schedule=Schedule(3e-4, args.steps, warmup=min(3, args.steps), final=0.05),
        prompts_per_step=args.prompts,
        group_size=8,
        sampling=Sampling(8, seed=0),
        on_step=lambda step, row, episodes: print(f"step {step + 1}  correct {row['accuracy']:.0%}", flush=True),
    )
    print("after:", evaluate(engine, held_out, Sampling(8, temperature=0.0)).accuracy)
    engine.close()


def served(args):
    """Train on a server of this machine, which ends with the program."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "textpolicy", "serve", args.model, "--port=0", f"--folder={folder}/serve"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            url = next(line for line in server.stdout if line.startswith("serving")).partition(" at ")[2].split(";")[0]
            run(*there(args.model, url), args)
            server.terminate()


parser = argparse.ArgumentParser()
parser.add_argument("--engine", choices=["mlx", "tinker"], default="mlx")
parser.add_argument("--model", default="smollm2-135m")
parser.add_argument("--serve", action="store_true")
for name, default in {"steps": 16, "prompts": 8, "test": 40}.items():
    parser.add_argument(f"--{name}", type=int, default=default)
args = parser.parse_args()
served(args) if args.serve else run(*{"mlx": here, "tinker": there}[args.engine](args.model), args)
