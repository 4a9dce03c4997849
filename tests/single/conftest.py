"""Settings of every test in this directory."""

from hypothesis import settings

# The same examples in every run, none remembered from earlier ones, and no time limit that a busy
# machine could miss.
settings.register_profile(
    "reproducible", derandomize=True, database=None, deadline=None, max_examples=100
)
settings.load_profile("reproducible")
