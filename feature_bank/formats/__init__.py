"""Readers and writers of SAE file formats, one module each."""
