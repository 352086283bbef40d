"""The code that runs on MLX. Importing this package imports ``mlx`` first, with a fast BLAS."""

from .blas import import_mlx

import_mlx()
