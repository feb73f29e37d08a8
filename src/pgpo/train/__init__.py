"""The drop-in trainer: the only folder that imports trl and transformers."""
