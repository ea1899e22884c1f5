"""Templates of the job files."""
