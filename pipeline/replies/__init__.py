"""What models answer, and their means."""
