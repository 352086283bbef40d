"""``python -m textpolicy`` is the ``textpolicy`` command."""

import sys

from .cli import main

sys.exit(main())
