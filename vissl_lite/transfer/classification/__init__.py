"""Classification: one class or several labels for each image."""
