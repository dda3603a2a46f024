"""The commands: one file a verb, one public function in it."""
