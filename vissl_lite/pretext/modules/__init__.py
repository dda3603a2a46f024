"""Building blocks shared by several pretexts."""
