"""Few-shot classification: a classifier head from a few labelled images (FLoWN 3.3, Table 5)."""
