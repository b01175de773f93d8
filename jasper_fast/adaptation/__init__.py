"""Adapt a student to documents: fit it to its teacher in closed form, choose by held-out agreement, and export it."""
