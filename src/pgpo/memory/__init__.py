"""The memory planner: peak memory per GPU of a training step, from the model's config alone.

what a model and a run are        shapes.py
what is held at each moment       moments.py
`pgpo plan`                       command.py
"""
