"""Whole runs: train, evaluate, report."""
