"""Pages for people: one run, several runs, one store, one pair."""
