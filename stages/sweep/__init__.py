"""`refshard sweep`: several policies on one set of shards."""
