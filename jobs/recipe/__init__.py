"""Recipes: the TOML files that describe jobs, checked."""
