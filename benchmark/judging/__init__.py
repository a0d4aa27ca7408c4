"""Judging runs that were measured and scored: ranks, paired ratios, a page to read."""
