"""Reading of labelled data that all tasks share: parts, tables, files, and the log of a reading."""
