"""Independent definitions that the package is tested against. Nothing here imports pgpo."""
