"""Faces, their labels, and how they are read: raw download -> prepared data set -> batches."""
