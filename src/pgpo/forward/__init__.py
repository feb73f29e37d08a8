"""A model's forward, without a trainer.

which rows share a forward                       batching.py
token ids -> one batch                           layout.py
a forward that ends in hidden states             open_model.py
student and teacher, prefix sharing              passes.py
"""
