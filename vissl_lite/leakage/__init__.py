"""Leak check: find evaluation images that an encoder was trained on."""
