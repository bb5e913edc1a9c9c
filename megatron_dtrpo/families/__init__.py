"""What is known of each model family, as names and numbers: one file a family, one row each in `registry`.

Nothing here imports torch, megatron-core or its callers. Tensors are moved in `conversion`.
"""
