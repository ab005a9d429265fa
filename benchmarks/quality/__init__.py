"""The study of methods: rows under one budget, run through `qat.train`, and the tables made of them."""
