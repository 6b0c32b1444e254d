"""Data sets whose micro-batches are pure functions of (seed, step, micro-batch)."""
