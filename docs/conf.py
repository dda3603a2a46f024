"""Configuration of the documentation; pages of commands and pretexts are made at build time."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "vissl_lite"
author = "The vissl_lite authors"
extensions = ["myst_parser", "generated_pages"]
html_theme = "furo"
exclude_patterns = ["_build"]
myst_heading_anchors = 4
smartquotes = False  # options begin with two hyphens
