"""The configuration for people who type it: a schema for editors, completion for shells."""
