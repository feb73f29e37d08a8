"""A model's forward without a trainer: how rows are laid out, what runs together, where the heads are applied.

which rows share a forward        batching.py
token ids -> a batch              layout.py
the model's forward, up to hidden states     open_model.py
student and teacher               passes.py
"""
