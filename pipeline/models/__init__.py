"""Which model, and what identifies it."""
