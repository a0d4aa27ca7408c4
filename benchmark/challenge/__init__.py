"""A whole challenge: every team's archive through the harness, one after another."""
