"""Import log-probs from outside as a store: columns of a file, or the answers of an inference engine."""
