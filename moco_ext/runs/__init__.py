"""A run directory: the options of a run, its metrics, and atomic file writes."""
