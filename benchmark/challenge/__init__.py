"""A whole challenge: every team's archive through the harness, one after another.

Takes a folder of archives, the CTs and their references; gives each team's run folder, the ranking
and one page.
"""
