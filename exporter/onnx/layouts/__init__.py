"""Folders that other runtimes open: the same modules, traced with the inputs and outputs that those runtimes feed."""
