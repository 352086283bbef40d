"""Train 13 numbers on countdown: TinyLoRA, GTPO and HICRA, as in experiments/countdown_reasoning_lora.py.

python examples/12_tinylora_countdown.py --steps 16 --output results/tinylora_countdown

It takes the flags of that script, runs it, and reads the 13 numbers back from the adapter that the script writes.
"""

import argparse
import runpy
import sys
from pathlib import Path

import textpolicy  # noqa: F401  before mlx: it gives MLX a fast BLAS

# isort: split
import mlx.core as mx

SCRIPT = Path(__file__).resolve().parents[1] / "experiments" / "countdown_reasoning_lora.py"

parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
parser.add_argument("--output", type=Path, default=Path("results/tinylora_countdown"))
args, others = parser.parse_known_args()
sys.argv = [str(SCRIPT), f"--output={args.output}", *others]
runpy.run_path(str(SCRIPT), run_name="__main__")

path = args.output / "adapter" / "adapters.safetensors"
[v] = [array for name, array in mx.load(str(path)).items() if name.endswith(".v")]
print(f"read back from {path}: {[round(x, 3) for x in v.reshape(-1).tolist()]}")
print(f"that is everything that was learned: {v.size} numbers, {v.nbytes} bytes; the rest of the file is names")
