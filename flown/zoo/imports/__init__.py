"""Zoos made of other people's checkpoints."""
