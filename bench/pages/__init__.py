"""Generators and checks of pages."""
