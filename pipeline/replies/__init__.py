"""What models answer: sampled replies, their rewards, their means."""
