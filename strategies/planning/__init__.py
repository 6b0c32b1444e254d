"""Who does what: layers, workers and micro-batches divided by what a step is predicted to take."""
