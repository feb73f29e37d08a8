"""What the commands `pgpo train` and `pgpo eval` do; `cli.py` only dispatches."""
