"""Export models: a merged folder for mlx-lm or transformers, an adapter for peft, or a GGUF file."""

from .gguf_file import QUANTS, export_gguf
from .model_folder import BITS, export_folder, merge
from .peft_adapter import check_base, export_peft

__all__ = ["BITS", "QUANTS", "check_base", "export_folder", "export_gguf", "export_peft", "merge"]
