"""Train one script on two engines: the largest of five numbers, on this machine or on a Tinker server.

python examples/15_tinker.py                                     on this machine, with MLX
python examples/15_tinker.py --engine tinker --serve             on a Tinker server that it starts here
python examples/15_tinker.py --engine tinker --model Qwen/Qwen3-4B-Instruct-2507      on the hosted service
"""

import argparse
import tempfile
from pathlib import Path

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


def there(model, server=None):
    """Return an engine on a Tinker server: the one started here, else TINKER_BASE_URL's, else the hosted service."""
    from textpolicy.tinker.engine import TinkerEngine

    where = {} if server is None else {"base_url": server.url, "reduction": "mean"}  # SkyRL on JAX averages
    engine = TinkerEngine.connect(model if server is None else server.name, rank=16, **where)
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
    """Train on SkyRL's Tinker API, started on this machine for the duration of the program."""
    from textpolicy.cli.tinker_server import served_model
    from textpolicy.tinker.server.server import LocalServer, ServerSettings

    settings = ServerSettings(model=served_model(args.model), folder=Path(tempfile.mkdtemp()), rank=16)
    with LocalServer(settings, say=print) as server:
        run(*there(args.model, server), args)


parser = argparse.ArgumentParser()
parser.add_argument("--engine", choices=["mlx", "tinker"], default="mlx")
parser.add_argument("--model", default="smollm2-135m")
parser.add_argument("--serve", action="store_true")
for name, default in {"steps": 16, "prompts": 8, "test": 40}.items():
    parser.add_argument(f"--{name}", type=int, default=default)
args = parser.parse_args()
served(args) if args.serve else run(*{"mlx": here, "tinker": there}[args.engine](args.model), args)
