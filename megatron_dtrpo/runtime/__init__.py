"""The only rooms that touch devices, processes and global state."""
