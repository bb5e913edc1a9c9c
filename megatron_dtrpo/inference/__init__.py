"""Block-cached decoding on a Megatron model."""
