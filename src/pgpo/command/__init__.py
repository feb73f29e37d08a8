"""What the commands `pgpo train`, `pgpo probe` and `pgpo eval` do; `cli.py` only dispatches."""
