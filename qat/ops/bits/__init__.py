"""Codes in 2 bits each: how a layer keeps its weight's between its passes, by device."""
