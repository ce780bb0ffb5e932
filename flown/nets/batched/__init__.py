"""Many networks of one architecture computed at once."""
