"""sweeps: studies on Ray, chosen by Optuna, recorded in MLflow.  `python -m sweeps --help`."""
