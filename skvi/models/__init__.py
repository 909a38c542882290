"""What to optimise: pure torch functions on small immutable records."""
