"""Objectives, one file per kind. An objective maps hidden states and a batch to a weighted sum of losses."""
