"""The resident process of a site or a worker: what knows recipes, on top of an engine's trainer."""
