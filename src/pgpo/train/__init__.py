"""The drop-in trainer on TRL and transformers. Start with trainer.py."""
