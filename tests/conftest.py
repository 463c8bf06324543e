"""What holds for every test."""

from hypothesis import settings

# A deadline for single examples would make a busy machine fail tests.
settings.register_profile("walbd", deadline=None)
settings.load_profile("walbd")
