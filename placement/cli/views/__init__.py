"""Reports as people want to see them. Pure: JSON-ready values in, rich renderables out."""
