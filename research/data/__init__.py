"""Real text, tokens and batches: pinned archives in, deterministic batches out."""
