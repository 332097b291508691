"""Renders reports for people. Pure: JSON-ready values in, rich renderables out."""
