"""What scoring, costing and evaluation need from torch."""
