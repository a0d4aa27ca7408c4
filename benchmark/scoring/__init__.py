"""Scoring label maps, as the challenge's own script does.

Takes reference and predicted label maps; gives DSC and NSD of every organ, case by case, and
their averages as tables and plots. Training scores its held-out cases with the same functions.
"""
