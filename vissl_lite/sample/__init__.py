"""The built-in sample data set: drawn images with labels, boxes and masks."""
