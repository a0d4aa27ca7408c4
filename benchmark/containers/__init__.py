"""Measuring containers, as the challenge's organisers do.

Takes a team's image, archive or command, and a folder of CT volumes; runs them case by case while
sampling GPU memory, CPU and RAM; gives label maps, and a run folder of times, peaks and areas.
"""
