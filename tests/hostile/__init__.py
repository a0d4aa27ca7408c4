"""A campaign of damaged volumes: a seeded generator of mutated NIfTI files, and their outcomes.

`python -m tests.hostile --count 10000` runs it; some hundreds of them are among the tests.
"""
