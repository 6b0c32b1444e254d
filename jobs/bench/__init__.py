"""Benchmarks, one per file; each measures Reknit beside a peer or a stated ideal."""
