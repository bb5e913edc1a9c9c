"""An HTTP server of checkpoints, and its page."""
