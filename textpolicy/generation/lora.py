"""The documented import path of LoRA and QLoRA; it lives in ``textpolicy.mlx``."""

from ..mlx.setup import apply_lora as apply_lora
from ..mlx.setup import create_lora_setup as create_lora_setup
from ..mlx.setup import create_qlora_setup as create_qlora_setup
from ..mlx.setup import extract_params as extract_params
from ..mlx.setup import freeze_base as freeze_base
from ..mlx.setup import merge_weights as merge_weights
