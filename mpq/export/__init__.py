"""Write an allocation for others to load: one target per file."""
