"""Models, each built as a list of layers and a loss."""
