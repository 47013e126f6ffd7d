"""Runs from Python: functions with keywords, and objects where the command line takes names."""
