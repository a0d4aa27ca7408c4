"""Scoring label maps, as the challenge's own script does; training scores with it as well."""
