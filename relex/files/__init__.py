"""Files: directories on a disk, in a bucket or on the Hub, and ranges of their bytes."""
