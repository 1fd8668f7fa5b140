"""Students over HTTP, with their label alone, on Ray Serve."""
