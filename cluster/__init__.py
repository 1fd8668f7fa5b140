"""On a Ray cluster: sending stages there, and what makes such a cluster."""
