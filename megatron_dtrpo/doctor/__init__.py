"""What this machine has (`machine`), what a run asks for (`requirements`), and how the two agree (`checks`)."""
