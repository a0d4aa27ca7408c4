"""A dry run of a team's submission, before it counts.

Takes a team's image or archive; runs it on phantoms or the team's own CTs in every way that can go
wrong; gives a list of what passed, what to check and what failed, with its cost and what to do.
"""
