"""Shards: find, index and stream images in local or remote tar files."""
