"""A package, lest one of that name in site-packages is imported instead."""
