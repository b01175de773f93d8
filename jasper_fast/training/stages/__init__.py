"""Kinds of training stages: texts against teachers, and images against their captions."""
