"""Our own folder, written for every run: it holds what no stock format can; transformers loads it after `import qat`."""
