"""Run the command line with ``python -m vissl_lite``."""

import sys

from vissl_lite.cli import main

sys.exit(main())
