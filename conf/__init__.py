"""Hydra configuration of the recipes: one primary file for each verb, one folder for each group."""
