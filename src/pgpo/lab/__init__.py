"""The laboratory: the tiny base model of the language world, and studies that run on it."""
