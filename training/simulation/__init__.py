"""Explanations put to the test: what they predict on unseen text, against what the feature does there."""
