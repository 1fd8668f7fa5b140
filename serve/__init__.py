"""`distill serve`: students over HTTP, on Ray Serve."""
