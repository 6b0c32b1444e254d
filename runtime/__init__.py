"""Decides, remembers and moves state. Nothing in here knows Ray."""
