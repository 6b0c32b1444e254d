"""Orders of forwards and backwards inside a step: one file each, listed in ``registry``."""
