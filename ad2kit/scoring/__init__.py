"""Bulk scoring of tables of any size."""
