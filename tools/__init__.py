"""Run from the checkout; not installed."""
