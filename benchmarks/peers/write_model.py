"""Write the model that all peers load: SmolLM2-135M-Instruct as a float32 folder in the Hugging Face layout.

    python write_model.py FOLDER

It has no chat template, so that every peer continues exactly the tokens it is given.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from textpolicy.mlx.models import find_model, load_model


def write(folder: Path) -> None:
    import mlx.core as mx  # after textpolicy, which puts OpenBLAS below it
    from mlx.utils import tree_flatten

    source = find_model("smollm2-135m")
    model, _ = load_model(source)
    folder.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    config = {k: v for k, v in config.items() if not k.startswith("quantization")} | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copy(source / "tokenizer.json", folder)
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    tokenizer.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")
    weights = {name: value.astype(mx.float32) for name, value in tree_flatten(model.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})


if __name__ == "__main__":
    write(Path(sys.argv[1]))
