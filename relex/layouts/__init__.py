"""One module a layout: what is complete on disk, and where the bytes of each tensor lie."""
