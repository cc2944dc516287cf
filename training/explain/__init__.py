"""Explanations of features, by rules that can be run or by a language model."""
