"""The HTTP face: REST, metrics and pages over one database, in one process."""
