"""Zoos trained from recipes."""
