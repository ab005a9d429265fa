"""Weights whose rows lie on several devices and travel as codes: a shard, all of them gathered, and the linear of that."""
