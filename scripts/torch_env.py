"""Make the environment with torch, transformers and peft that the tests of `textpolicy export` hold against.

It is the one of the benchmark against TRL, in the user's cache (1.5 GB where pip's torch is the CPU build, as on
macOS; on Linux pip takes the CUDA build, of several GB more, unless it is set up otherwise). It prints its Python.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "peers"))

from run import ENVS, PEERS, environment

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print(environment(PEERS["trl-float32"], ENVS))
