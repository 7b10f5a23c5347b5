"""Judging responses by a model: what it is asked, the captions it may read, and its scores."""
