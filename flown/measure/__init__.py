"""Networks measured, however they were made."""
