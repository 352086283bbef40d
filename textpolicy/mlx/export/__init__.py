"""Export models: a merged folder for mlx-lm or transformers, an adapter for peft, or a GGUF file."""

from pathlib import Path

from .bpe import read_byte_level
from .files import check_layout, read_config
from .gguf_file import QUANTS, check_family, export_gguf
from .model_folder import BITS, export_folder, merge
from .peft_adapter import check_base, export_peft

__all__ = ["BITS", "QUANTS", "check_base", "check_model", "export_folder", "export_gguf", "export_peft", "merge"]


def check_model(folder: Path, to: str) -> None:
    """Raise UserError unless the model in ``folder`` can be exported ``to`` that form, without reading its weights."""
    if to in ("hf", "peft"):
        check_layout(read_config(folder), to)
    elif to == "gguf":
        check_family(read_config(folder))
        read_byte_level(folder)
