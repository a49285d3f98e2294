"""``python -m fastconv``: see :mod:`fastconv.cli`."""

import sys

from .cli import main

sys.exit(main())
