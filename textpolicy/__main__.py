"""``python -m textpolicy`` is the ``textpolicy`` command."""

import sys

from .cli.main import main

sys.exit(main())
