"""`python -m pipelines` is `distill`."""

from pipelines.cli import main

if __name__ == "__main__":
    main()
