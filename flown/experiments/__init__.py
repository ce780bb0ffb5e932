"""The paper's tables and the demo: a config in, rows out, by the public API alone."""
