"""Hugging Face folders to Megatron checkpoints and back, tensor by tensor and without building a model."""
