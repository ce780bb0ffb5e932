"""Networks brought into one order of units and signs."""
