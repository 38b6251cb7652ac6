"""Finds the cheapest student that meets a target."""
