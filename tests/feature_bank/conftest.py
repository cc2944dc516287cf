"""Property tests of this folder: the same few examples in every run, however slow the machine."""

from hypothesis import settings

settings.register_profile("steady", deadline=None, max_examples=40, derandomize=True, database=None)
settings.load_profile("steady")
