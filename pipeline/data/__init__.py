"""Dataset row to pair to token ids."""
