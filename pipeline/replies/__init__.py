"""Replies of models to prompts, and their means."""
