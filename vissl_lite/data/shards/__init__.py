"""Shards: images in tar files, on a disk or behind URLs, found, indexed and streamed."""
