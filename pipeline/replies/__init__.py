"""Replies of models: drawn, scored under both models, rewarded, averaged."""
