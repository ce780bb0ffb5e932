"""Networks as vectors: layouts, scales, batches."""
