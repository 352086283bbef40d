"""The folder in which what was made once is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``TEXTPOLICY_CACHE``, or the user's cache folder."""
    from platformdirs import user_cache_dir  # of the extras mlx and tinker

    return Path(os.environ.get("TEXTPOLICY_CACHE") or user_cache_dir("textpolicy")).expanduser()
