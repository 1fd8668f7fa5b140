"""Distilling step-by-step as a chain of stages on Ray: teacher, rationales, students, report."""
