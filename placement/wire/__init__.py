"""Pydantic models at every border: deployment files, actor messages, JSON."""
