"""A run directory: who may write there, the run's options and metrics, and atomic file writes."""
