"""What a run leaves on disk: the folder, its files, and stopping in between."""
