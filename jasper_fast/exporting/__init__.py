"""Exports of a student, checked before they are published."""
