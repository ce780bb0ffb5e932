"""The version, apart from everything that is slow to import."""

__version__ = "0.1.0"
