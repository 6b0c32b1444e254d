"""Where it runs: the Ray actors. Nothing outside this package knows Ray's actor API."""
