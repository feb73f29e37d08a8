"""The memory planner: peak memory per GPU of a training step, from the model's config alone.

model and training setting          shapes.py
what stays from step to step        parameters.py
what autograd saves                 activations.py
what is held at each moment         moments.py
`pgpo plan`: budgets and advice     command.py
"""
