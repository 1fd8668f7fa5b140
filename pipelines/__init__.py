"""Distilling step-by-step as a chain of stages on Ray: teacher, rationales, students, report."""

import os
import sys

# Ray reads it when it is first imported; set later, a client would send no token to the cluster that asks for it
if "ray" not in sys.modules:
    os.environ.setdefault("RAY_AUTH_MODE", "token")
