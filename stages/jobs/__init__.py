"""Templates of job files."""
