"""Readers and writers of SAE file formats, one module each."""

from feature_bank.formats.detection import FORMATS, detect, load_sae, read_source
from feature_bank.formats.source import Format, LoadedSAE, SourceOptions

__all__ = ["FORMATS", "Format", "LoadedSAE", "SourceOptions", "detect", "load_sae", "read_source"]
