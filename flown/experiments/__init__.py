"""The paper's tables and the demo: a config in, rows out, using only what users can use."""
