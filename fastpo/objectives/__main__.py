"""`python -m fastpo.objectives > docs/objectives.md`."""

from ._describe import page

print(page(), end="")
