"""Pages about a run, a store, a pair."""
