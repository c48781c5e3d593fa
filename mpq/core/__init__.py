"""Domain types: what flows through a search. Standard library and numpy only."""
