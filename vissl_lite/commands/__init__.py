"""Commands: one module per command, with one public function each."""
