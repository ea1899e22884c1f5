"""Write a run's adapter and its base as one plain model."""
