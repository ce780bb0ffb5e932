"""A population in figures."""
