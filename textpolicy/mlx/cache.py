"""The folder in which converted models and factorised weights are kept between runs."""

from ..cache import cache_folder as cache_folder
