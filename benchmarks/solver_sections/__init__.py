"""Sections of the solver benchmark: each answers one question and prints a table."""
