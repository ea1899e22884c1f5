"""Files, errors, signals and progress: what stands on nothing of ours, and never loads torch."""
