"""The documented import path of what loads a model and writes with it; it lives in ``textpolicy.mlx``."""

from ..mlx.models import load_model as load_model
from ..mlx.policy import create_policy as create_policy
from ..mlx.policy import decode as decode
from ..mlx.policy import decode_token_ids as decode_token_ids
from ..mlx.policy import encode as encode
from ..mlx.policy import generate_tokens as generate_tokens
