"""Readers of all dataset layouts: folders of clips, lists and tables. They yield one entry per clip."""
