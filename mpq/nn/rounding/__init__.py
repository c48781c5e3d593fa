"""Roundings better than nearest, one file each."""
