"""The quickstart's own task, data and tiny models: what `distill demo` runs on, with no download."""
