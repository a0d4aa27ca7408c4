"""An organiser's evening: every team's archive through the whole harness, one after another.

Takes a folder of archives, the CTs and their references; gives each team's run folder, the ranking
and one page.
"""
