"""Training on what the policy itself writes: rollouts, rewards, advantages, and the loop."""
