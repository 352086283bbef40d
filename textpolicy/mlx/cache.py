"""The folder in which converted models and factorised weights are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_dir


def cache_folder() -> Path:
    """``TEXTPOLICY_CACHE``, or the user's cache folder."""
    return Path(os.environ.get("TEXTPOLICY_CACHE") or user_cache_dir("textpolicy")).expanduser()
