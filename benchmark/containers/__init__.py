"""Measuring containers, as the challenge's organisers do."""
