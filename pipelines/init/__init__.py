"""`distill init`: a data file → a commented task file and a recipe that run as they are."""

from pipelines.init.project import Project, Propose, init_project

__all__ = ["Project", "Propose", "init_project"]
