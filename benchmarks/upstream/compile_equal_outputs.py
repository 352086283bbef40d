"""Show that mx.compile of MLX 0.32.4 fails, on any device, where two outputs are equal under stop_gradient.

It ends in IndexError (unordered_map::at), raised in compile_replace; so do equal auxiliary outputs of value_and_grad.
"""

import mlx.core as mx

x = mx.ones((2, 3))
print(mx.compile(lambda x: mx.stack([mx.stop_gradient(x + 1), mx.stop_gradient(x + 1)]))(x).shape)  # one output: works
print(len(mx.compile(lambda x: [mx.stop_gradient(x + 1), mx.stop_gradient(x + 1)])(x)))
