"""Replies of models, and their means."""
