"""Joined rows to batches to loss to policy."""
