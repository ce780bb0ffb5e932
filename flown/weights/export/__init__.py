"""Networks of a batch as files that run without this library."""
