"""The user's cache folder: models, factorisations and environments that later runs reuse."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return ``TEXTPOLICY_CACHE``, or else textpolicy's folder in the user's cache."""
    from platformdirs import user_cache_dir  # installed with the extras mlx and tinker

    return Path(os.environ.get("TEXTPOLICY_CACHE") or user_cache_dir("textpolicy")).expanduser()
