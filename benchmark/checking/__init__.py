"""A dry run of a team's submission, in every way that can go wrong, before it counts."""
