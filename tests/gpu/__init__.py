"""Tests on a GPU. A package, so that its files may have the names of those above it; those are imported as ever."""
