"""A page on which networks are written for drawings, in the browser."""
