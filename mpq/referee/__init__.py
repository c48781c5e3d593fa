"""The referee: which sensitivity metric to believe on a network, by real measurements."""
