"""What several pretexts are made of."""
