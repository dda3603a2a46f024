"""Pages that show a run, and maps of images: self-contained HTML."""
