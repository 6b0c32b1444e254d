"""Recipes that come with Reknit, as TOML files."""
