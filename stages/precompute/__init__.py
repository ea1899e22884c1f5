"""`refshard precompute`: stage one, which scores pairs with the frozen reference into shards."""
