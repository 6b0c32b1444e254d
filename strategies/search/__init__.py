"""Which strategy a run should use: every combination weighed by one cost model, exactly."""
