"""Measured ratios that a user can rerun on their own device, one module each."""
