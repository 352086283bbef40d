"""The documented import path of saving and reloading adapters; it lives in ``textpolicy.mlx``."""

from ..mlx.reload import create_auto_reload_setup as create_auto_reload_setup
from ..mlx.reload import create_reloadable_policy as create_reloadable_policy
from ..mlx.reload import reload_model as reload_model
from ..mlx.reload import save_adapters as save_adapters
