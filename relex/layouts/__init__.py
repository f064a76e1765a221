"""One module a layout: where in a step directory its files are, and where in them the bytes of each tensor lie."""
