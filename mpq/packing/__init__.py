"""Live objects as files that other processes read without running anything that the file names."""
