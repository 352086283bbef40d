"""Everything that runs on MLX. Importing this package is what first imports ``mlx``, with a fast BLAS."""

from .blas import import_mlx

import_mlx()
