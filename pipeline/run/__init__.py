"""The folder that stage two writes: attempts, checkpoints, records."""
