"""``python -m vissl_lite``: the same as ``vissl-lite``."""

import sys

from vissl_lite.cli import main

sys.exit(main())
