"""Show that a process in which a thread has called compiled functions aborts at its end with MLX 0.32.4 on Linux.

"terminate called without an active exception": what is compiled is kept by thread, and freed after Python's part of the
thread, all that ``join`` waits for, has ended. Freeing it needs Python, which is ending.
"""

import threading

import mlx.core as mx

kept = [mx.compile(lambda x, i=i: (x * i).sum() + mx.exp(x).max()) for i in range(40)]
thread = threading.Thread(target=lambda: mx.eval([f(mx.ones(10)) for f in kept]))
thread.start()
thread.join()
