"""What this machine has (`facts`), what a configuration asks for (`needs`), and how the two agree (`checks`)."""
