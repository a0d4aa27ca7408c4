"""Judging runs that were measured and scored.

Takes run folders of one team or many (times, areas, scores); gives a ranking with its confidence,
paired ratios of two runs, and one page to read in a browser.
"""
