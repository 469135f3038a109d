"""Edits of an image: what a person gives for one, how it is made, what it carries."""
