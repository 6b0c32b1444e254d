"""Training engines of other systems as elastic workers."""
