"""The configuration of a run: fields, rules, and the way from flags and recipes to them."""
