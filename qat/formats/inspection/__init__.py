"""What a model file or folder holds, and whether two hold the same; of any kind that `qat.formats.contents` reads."""
