"""Joined rows to loss to policy."""
