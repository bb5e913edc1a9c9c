"""The parts of tools/gpu_check.py, each a function ``(size, folder) -> Result`` that runs in a process of its own."""
