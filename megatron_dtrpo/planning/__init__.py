"""What a run will need, known before it starts: memory per GPU, a rough time per step, layouts. Pure functions."""
