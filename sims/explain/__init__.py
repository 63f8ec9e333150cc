"""Why a prediction is what it is: what binds, where time goes, how much each constant matters, what would change the bottleneck."""
