"""Puts esfast underneath other training code. There is a module for each library, which imports that library only.
docs/how-to/coming-from.md and docs/how-to/vllm.md show each, before and after."""
