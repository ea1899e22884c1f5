"""Files, errors, signals, progress: stands on nothing of ours, never loads torch."""
