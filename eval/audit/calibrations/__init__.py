"""Calibrations of the audit, each a JSON file."""
