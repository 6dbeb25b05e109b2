"""Our loader beside webdataset and Energon: clips, sources, runs and what they cost."""
