"""The parts that megatron-core builds: the layer spec, the core attention and the model."""
