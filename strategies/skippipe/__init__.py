"""Micro-batches that skip stages or pass them in another order (SkipPipe)."""
