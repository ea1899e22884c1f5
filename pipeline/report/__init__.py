"""HTML pages: one run, several runs, one store, one pair."""
