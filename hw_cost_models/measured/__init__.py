"""Times of real kernels on this machine: the stopwatch, and one backend per file."""
