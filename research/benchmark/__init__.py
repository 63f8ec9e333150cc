"""Is it right and how fast is it, on the machine at hand: checks, rates beside measured peaks, a dated page.

Needs torch and the model alone: no Ray, MLflow, Optuna or transformers.
"""
