"""What a checkpoint writes and scores: verifiers, benchmarks, periodic evaluation."""
