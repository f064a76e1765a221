"""State: what is kept on disk between the stages, and how it is read and written."""
