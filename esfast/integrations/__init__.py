"""esfast underneath other people's training code: a module for each, which imports what it integrates with and nothing
else of this folder's friends. docs/how-to/coming-from.md shows each, before and after."""
