"""Recipes: one readable file for each verb of ``lightning-qat``; files with an underscore serve them."""
