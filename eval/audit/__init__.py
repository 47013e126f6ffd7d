"""The audit of a received set: evidence, calibration, verdict."""
