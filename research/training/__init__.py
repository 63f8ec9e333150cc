"""Training: a loop of one page, its records, its checkpoints."""
