"""What a network's own graph says: which units can be exchanged."""
