"""What a checkpoint writes and scores: sessions, verifiers, benchmarks."""
