"""Re-ground: real steps and jumps in turn, with the user's own trainer."""
