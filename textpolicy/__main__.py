"""Run the ``textpolicy`` command as ``python -m textpolicy``."""

import sys

from .cli.main import main

sys.exit(main())
