"""The documented import path of what loads a model and writes with it; it lives in ``textpolicy.mlx``."""

from .mlx_generation import create_policy as create_policy
from .mlx_generation import decode as decode
from .mlx_generation import decode_token_ids as decode_token_ids
from .mlx_generation import encode as encode
from .mlx_generation import generate_tokens as generate_tokens
from .mlx_generation import load_model as load_model
