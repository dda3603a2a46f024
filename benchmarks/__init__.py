"""Scripts that measure, run as ``python -m benchmarks.FOLDER.NAME``, and what they measured."""
