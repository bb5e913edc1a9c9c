"""Sizes that bound memory, for the model and for the planner, which knows no model."""

# Target rows whose logits are alive at once; more rows are recomputed chunk by chunk in the backward pass.
LOGIT_ROWS = 2048
