"""The documented functions that load a model, attach an adapter to it and generate text with it."""

from ..mlx.models import load_model as load_model
from .lora import apply_lora as apply_lora
from .lora import create_lora_setup as create_lora_setup
from .lora import create_qlora_setup as create_qlora_setup
from .lora import extract_params as extract_params
from .lora import freeze_base as freeze_base
from .lora import merge_weights as merge_weights
from .mlx_generation import create_policy as create_policy
from .mlx_generation import decode as decode
from .mlx_generation import decode_token_ids as decode_token_ids
from .mlx_generation import encode as encode
from .mlx_generation import generate_tokens as generate_tokens
from .reload import create_auto_reload_setup as create_auto_reload_setup
from .reload import create_reloadable_policy as create_reloadable_policy
from .reload import reload_model as reload_model
from .reload import save_adapters as save_adapters
