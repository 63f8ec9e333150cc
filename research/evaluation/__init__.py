"""How good a trained model is, and beside what."""
