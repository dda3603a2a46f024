"""The leak guard: whether evaluation images were among those that an encoder was trained on."""
