"""Speed and memory, ours beside others': `python -m tools.benchmarks.NAME`, from the checkout."""
