"""Model and pairs to token log-probs, the same way in both stages."""
