"""Networks that really run in the chosen formats: written for a runtime, checked and timed."""
