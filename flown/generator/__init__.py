"""Where encoder, context and flow meet."""
